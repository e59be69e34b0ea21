"""Text to token ids and back, by sentencepiece (tokenizer.model) or tokenizers (tokenizer.json, vocab.*), with one interface.

Not here: chat templates and padding. The ids equal those of transformers; see tests/test_tokenizer.py."""

import json
import os
import re
import sys
from contextlib import contextmanager
from functools import cached_property

import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from minitune.files import JsonFolder, read_bytes
from minitune.formats.templates import BOS, EOS, Special
from minitune.schema import Number, check
from minitune.screen import printable, short, warn

END_OF_TEXT = "<|endoftext|>"  # end token of GPT-2 and Phi, if no file names one
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BERT_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
# protobuf of normalizer_spec {add_dummy_prefix: false}; appended to a serialised model, it overrides that field.
NO_DUMMY_SPACE = b"\x1a\x02\x18\x00"

# Shapes of the JSON files beside a tokenizer: the keys that are read.
TOKEN_ID = Number(0, 2**24, is_whole=True)  # the largest vocabularies have 2**18
TOKEN, CHOICE, INTEGER = (None, str, {"content": str}), (None, bool), Number(is_whole=True)
SHAPES = {
    "tokenizer_config.json": {
        "bos_token?": TOKEN,
        "eos_token?": TOKEN,
        "added_tokens_decoder?": (None, {str: {"content": str, "special?": bool}}),
        **{f"{key}?": CHOICE for key in ("add_bos_token", "add_prefix_space", "do_lower_case")},
        **{f"{key}?": CHOICE for key in ("strip_accents", "tokenize_chinese_chars")},
    },
    "special_tokens_map.json": {"bos_token?": TOKEN, "eos_token?": TOKEN},
    "added_tokens.json": {str: TOKEN_ID},
    "config.json": {"eos_token_id?": (None, INTEGER, [INTEGER])},
    "generation_config.json": {"eos_token_id?": (None, INTEGER, [INTEGER])},
}


def load_tokenizer(folder):
    """The Tokenizer of a model folder, from the first of these files: tokenizer.model, tokenizer.json, vocab.json with
    merges.txt (GPT-2, RoBERTa), vocab.txt (BERT).

    tokenizer.model takes precedence over tokenizer.json. Llama and Mistral have both; they were trained with sentencepiece, and
    the converted JSON differs in leading and doubled spaces. If tokenizer.model is not a sentencepiece model (Llama 3 has
    tiktoken's under this name), the JSON is used with a warning.
    BOS: for sentencepiece the model's own, unless tokenizer_config.json has add_bos_token false. For tokenizer.json it is
    the token that the post-processor prepends (Llama 3), or bos_token if tokenizer_config.json has add_bos_token true.
    EOS: eos_token of tokenizer_config.json or special_tokens_map.json, else sentencepiece's own, else eos_token_id of
    generation_config.json or config.json, else <|endoftext|>.
    folder: a path, or a ModelFolder, whose parsed JSON files are shared.
    Raises ValueError on a missing or damaged file, or a token name without an id."""
    files = folder if isinstance(folder, JsonFolder) else JsonFolder(folder)
    folder = files.path
    others = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
    has_other = any(all((folder / name).is_file() for name in names) for names in others)
    if (folder / "tokenizer.model").is_file():
        try:
            return SentencePieceTokenizer(files, read_sentencepiece(folder / "tokenizer.model"))
        except NotSentencePiece as error:
            if not has_other:
                raise
            warn(f"{error}. The tokenizer.json or vocabulary beside it is used.")
    if has_other:
        return JsonTokenizer(files)
    hint = (
        "; tekken.json is not supported, use tokenizer.json of the same model"
        if (folder / "tekken.json").is_file()
        else ""
    )
    raise ValueError(
        f"{folder} has no tokenizer: expected tokenizer.model, tokenizer.json, vocab.json + merges.txt, or vocab.txt{hint}"
    )


class NotSentencePiece(ValueError):
    """A tokenizer.model that is damaged or not of sentencepiece."""


class Tokenizer:
    """The part that SentencePieceTokenizer and JsonTokenizer share. Attributes:

    vocab_size: 1 + the largest id. bos_id: None if the family uses no BOS (Phi). eos_id: None if no file names one. eos_ids:
    every id that ends a generated text, eos_id first. pad_id: any valid id, because padding is masked by position."""

    def __init__(self, files):
        """Read the JSON files beside the tokenizer's own file. files: the JsonFolder of the model. The subclasses then call
        finish()."""
        self.files, self.folder = files, files.path
        self.config = read_optional(files, "tokenizer_config.json")
        self.added = {}  # id -> (text, is_special)
        for text, token_id in read_optional(files, "added_tokens.json").items():
            self.added[token_id] = text, not text.isspace()
        for digits, token in (self.config.get("added_tokens_decoder") or {}).items():
            where = f"{files.path / 'tokenizer_config.json'}: added_tokens_decoder"
            token_id = check(int(digits) if re.fullmatch(r"-?\d{1,20}", digits) else digits, TOKEN_ID, where)
            self.added[token_id] = token["content"], token.get("special", False)

    def finish(self, bos_id, eos_id, otherwise=None):
        """Set the special ids. bos_id, eos_id: those in the tokenizer's own file, or None. otherwise: the end token if no file
        names one."""
        add_bos = self.config.get("add_bos_token")
        if add_bos:
            bos_id = self.named("bos_token", bos_id)
        self.bos_id = None if add_bos is False else bos_id
        rows = max(self.vocab_size, embedding_rows(self.files))
        stops = end_ids(self.files, warn)
        if beyond := [i for i in stops if i >= rows]:
            warn(
                f"{self.folder}: eos_token_id is {beyond[0]}, but the model has {rows:,} tokens; it is ignored. Check that "
                "config.json and the tokenizer belong to the same model"
            )
        stops = [i for i in stops if i < rows]
        own = self.named("eos_token", eos_id)
        if own is not None and stops and own not in stops:
            warn(
                f"{self.folder}: the end token is {self.name_of(stops[0])} in config.json or generation_config.json, but "
                f"{self.name_of(own)} in the tokenizer. Rows get {self.name_of(own)}; answers end at either."
            )
        known = [i for i in stops if self.is_own(i) or i in self.added]
        self.eos_id = own if own is not None else known[0] if known else otherwise
        self.eos_ids = list(dict.fromkeys(([] if self.eos_id is None else [self.eos_id]) + stops))
        self.pad_id = 0 if self.eos_id is None else self.eos_id

    def name_of(self, token_id):
        """A token's text and id, for messages."""
        return f"{short(self.piece(token_id))} ({token_id})"

    def named(self, key, otherwise):
        """The id of the token that `key` names in tokenizer_config.json, else in special_tokens_map.json, else `otherwise`. The
        value is a text or {"content": text}."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            text = read_optional(self.files, name).get(key)
            text = text["content"] if isinstance(text, dict) else text
            if text is None:
                continue
            if not text:
                warn(f"{self.folder / name}: {key} is empty; the tokenizer's own is used")
                return otherwise
            token_id = self.id_of(text)
            if token_id is None:
                raise ValueError(f"{self.folder / name} names {key} {short(text)}, which the tokenizer does not have")
            return token_id
        return otherwise

    def encode(self, text, add_bos=True, allow_special=True, goes_on=False):
        """Ids of `text` as a list, without EOS. BOS is first if add_bos is set and the family has one.

        allow_special: replace the text of a special token by its id, as tokenizers does (sentencepiece never does). With False,
        as for rows of data and other text from outside, it is ordinary text. goes_on: the text continues another one, so no space
        is added at its start. Raises ValueError if `text` is no valid text."""
        if not isinstance(text, str):
            raise ValueError(f"expected text, got {type(text).__name__} {short(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has half a surrogate pair ({text[error.start]!r}) at character {error.start}; "
                "it is not Unicode text"
            ) from None
        with explained(f"the tokenizer of {self.folder} fails on the text", text):
            ids = self.encode_text(text, allow_special, goes_on)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_pieces(self, pieces):
        """Ids of a row or a conversation: one list for each piece. A piece is a text, BOS, EOS, a Special or an id.

        Adjacent texts get the ids of the joined text. If a token would cross the border between two of them, the first keeps the
        ids that it has alone, and the second is encoded as a continuation, just as an answer follows a prompt in decoding. A
        text after a special token is a continuation too, except after BOS. The text of special tokens is ordinary text
        here."""
        found, text, ids, goes_on = [], "", [], False
        for piece in pieces:
            if piece is BOS or piece is EOS or not isinstance(piece, str) or isinstance(piece, Special):
                special = self.special_id(piece)
                found.append([] if special is None else [special])
                text, ids, goes_on = "", [], piece is not BOS and special != self.bos_id
                continue
            whole = self.encode(text + piece, add_bos=False, allow_special=False, goes_on=goes_on)
            if whole[: len(ids)] == ids:
                found.append(whole[len(ids) :])
                text, ids = text + piece, whole
            else:
                text, goes_on = piece, True
                ids = self.encode(piece, add_bos=False, allow_special=False, goes_on=True)
                found.append(ids)
        return found

    def special_id(self, piece):
        """The id of BOS, EOS, a Special or an id; None if the tokenizer has no such BOS or EOS. Raises ValueError on a Special
        that it does not have."""
        if piece is BOS or piece is EOS:
            return self.bos_id if piece is BOS else self.eos_id
        if isinstance(piece, int):
            return piece
        token_id = self.id_of(piece)
        if token_id is None:
            raise ValueError(f"the tokenizer of {self.folder} has no token {piece}; choose another template")
        return token_id

    @cached_property
    def special_pattern(self):
        """A regular expression that matches the text of any special token, with one group for each; None if there are none."""
        texts = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(f"({self.special_tokens[text][1]})" for text in texts)) if texts else None

    def split_special(self, text):
        """`text` as pieces for encode_pieces(): texts, and ids in place of the texts of special tokens."""
        pieces, end = [], 0
        for found in self.special_pattern.finditer(text) if self.special_pattern else ():
            content = found[found.lastindex].strip() if found[0] not in self.special_tokens else found[0]
            pieces += [text[end : found.start()]] * (found.start() > end) + [self.special_tokens[content][0]]
            end = found.end()
        return pieces + [text[end:]] * (end < len(text) or not pieces)

    def decode(self, ids, goes_on=False):
        """The text of `ids`. Special tokens of tokenizer.json keep their text; those of sentencepiece have none.

        An id without a token becomes U+FFFD: the embedding of a model may have more rows than the tokenizer has tokens.
        goes_on: the ids continue another text, so a space at their start is kept. Otherwise it is removed if the tokenizer
        adds one before every text."""
        if goes_on:
            before = self.encode("a", add_bos=False)
            return self.decode([*before, *ids])[len(self.decode(before)) :]
        parts, run = [], []
        for token_id in [*map(int, ids), None]:
            if token_id is not None and self.is_own(token_id):
                run.append(token_id)
                continue
            if run:
                parts.append(self.decode_own(run))
                run = []
            if token_id is not None:
                parts.append(self.added[token_id][0] if token_id in self.added else "\ufffd")
        return "".join(parts)


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model, by sentencepiece. Added tokens beyond its size are decoded, but never result from encoding a text.

    Encoding adds the dummy space of Llama and Mistral before a text, and decoding removes it."""

    is_byte_level = False

    def __init__(self, files, model):
        super().__init__(files)
        self.model, self.size = model, model.vocab_size()
        self.added = {i: t for i, t in self.added.items() if i >= self.size or self.model.id_to_piece(i) != t[0]}
        self.vocab_size = max([self.size - 1, *self.added]) + 1
        own = [i if i >= 0 else None for i in (self.model.bos_id(), self.model.eos_id())]
        self.finish(*own)

    @cached_property
    def model_without_dummy(self):
        """The same model without the dummy space, for a text that continues another."""
        return sentencepiece.SentencePieceProcessor(model_proto=self.model.serialized_model_proto() + NO_DUMMY_SPACE)

    @cached_property
    def special_tokens(self):
        """{text: (id, regular expression for the text)} of the control tokens and the added special tokens."""
        control = {self.model.id_to_piece(i): i for i in range(self.size) if self.model.is_control(i)}
        added = {text: i for i, (text, is_special) in self.added.items() if is_special}
        return {text: (i, re.escape(text)) for text, i in (control | added).items()}

    def id_of(self, text):
        """The id of the token with this text, or None."""
        if (found := next((i for i, (content, _) in self.added.items() if content == text), None)) is not None:
            return found
        with explained(f"{self.folder} names a token that sentencepiece does not take:", text):
            found = self.model.piece_to_id(text)  # the id of <unk> if there is no such piece
        return found if self.model.id_to_piece(found) == text else None

    def is_own(self, token_id):
        """Whether the id is in the tokenizer.model, and not an added token."""
        return 0 <= token_id < self.size and token_id not in self.added

    def encode_text(self, text, allow_special, goes_on):
        """Ids of `text` without BOS; arguments as in encode()."""
        return (self.model_without_dummy if goes_on else self.model).encode(text)

    def decode_own(self, ids):
        """The text of ids for which is_own() holds."""
        return self.model.decode(ids)

    def piece(self, token_id):
        """The text of one token for display; a single byte as <0xE4>."""
        return readable(self.model.id_to_piece(token_id)) if self.is_own(token_id) else self.decode([token_id])


class JsonTokenizer(Tokenizer):
    """tokenizer.json, or vocab.json and merges.txt (GPT-2, RoBERTa), or vocab.txt (BERT), by tokenizers.

    frame: ([ids before], [ids after]) that the post-processor puts around a text: <s> and </s>, [CLS] and [SEP], only BOS,
    or nothing. is_byte_level: whether it is a byte-level BPE."""

    def __init__(self, files):
        super().__init__(files)
        folder = files.path
        read = {"tokenizer.json": read_json_file, "vocab.json": read_bpe, "vocab.txt": read_wordpiece}
        path = next(folder / name for name in read if (folder / name).is_file())
        if found := other_kind(read_bytes(path)):
            raise ValueError(f"{path} is {found}")
        with explained(f"{path} cannot be read as a tokenizer"), silence():
            self.model = read[path.name](folder, self.config)
            self.model.no_truncation()  # the file may have truncation and padding settings of a training run
            self.model.no_padding()
            wrapped = self.model.encode("a")
        for token_id, (text, is_special) in sorted(self.added.items()):
            with explained(f"{folder} adds a token {short(text)} that tokenizers does not take"):
                if self.model.token_to_id(text) is None:
                    self.model.add_tokens([AddedToken(text, special=is_special, normalized=not is_special)])
            if self.model.token_to_id(text) != token_id:
                raise ValueError(
                    f"{folder} gives {short(text)} the id {token_id} in tokenizer_config.json or "
                    f"added_tokens.json, but {path.name} gives it {self.model.token_to_id(text)}; "
                    "one of them belongs to another model"
                )
        self.added = {}
        self.vocab_size = 1 + max(self.model.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise ValueError(f"{path} has an empty vocabulary")
        self.is_byte_level = "ByteLevel" in repr(self.model.decoder)
        inner = [i for i, special in enumerate(wrapped.special_tokens_mask) if not special] or [0]
        prefix = wrapped.ids[: inner[0]]
        self.frame = prefix, wrapped.ids[inner[-1] + 1 :]
        if len(prefix) > 1:
            raise ValueError(
                f"{path} puts the {len(prefix)} tokens {short(prefix)} before a text; expected one BOS or none"
            )
        self.finish(prefix[0] if prefix else None, None, self.id_of(END_OF_TEXT))

    @cached_property
    def plain(self):
        """A second tokenizer that encodes the text of special tokens as ordinary text. BOS and EOS are always treated as
        special."""
        plain = FastTokenizer.from_str(self.model.to_str())
        ends = {self.model.id_to_token(i) for i in (self.bos_id, *self.eos_ids) if i is not None} - {None}
        plain.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in sorted(ends)])
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def plain_without_prefix(self):
        """`plain` for a text that continues another: without the steps that add a space before a text."""
        settings = json.loads(self.plain.to_str())
        changed = settings | {key: without_prefix(settings[key]) for key in ("normalizer", "pre_tokenizer")}
        if changed == settings:
            return self.plain
        model = FastTokenizer.from_str(json.dumps(changed))
        model.encode_special_tokens = True
        return model

    @cached_property
    def special_tokens(self):
        """{text: (id, regular expression for the text)} of the special tokens. Some also match the white space around them."""
        ends = [i for i in (self.bos_id, *self.eos_ids) if i is not None and self.is_own(i)]
        found = {self.model.id_to_token(i): (i, re.escape(self.model.id_to_token(i))) for i in ends}
        for i, token in self.model.get_added_tokens_decoder().items():
            if token.special:
                around = [r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip)]
                found[token.content] = i, re.escape(token.content).join(around)
        return found

    def id_of(self, text):
        """The id of the token with this text, or None."""
        with explained(f"{self.folder} names a token that tokenizers does not take:", text):
            return self.model.token_to_id(text)

    def is_own(self, token_id):
        """Whether the tokenizer has a token with this id."""
        return self.model.id_to_token(token_id) is not None if token_id >= 0 else False

    def encode_text(self, text, allow_special, goes_on):
        """Ids of `text` without BOS; arguments as in encode()."""
        model = self.plain_without_prefix if goes_on else self.model if allow_special else self.plain
        return model.encode(text, add_special_tokens=False).ids

    def encode_framed(self, text, max_length=None):
        """Ids of `text` with the tokens that an encoder expects around it, <s> ... </s> or [CLS] ... [SEP].

        max_length: most ids, with these tokens; a longer text is truncated at its end. None: no limit."""
        before, after = self.frame
        ids = self.encode(text, add_bos=False)
        if max_length is not None:
            ids = ids[: max(0, max_length - len(before) - len(after))]
        return [*before, *ids, *after]

    def decode_own(self, ids):
        """The text of ids for which is_own() holds."""
        return self.model.decode(ids, skip_special_tokens=False)

    def piece(self, token_id):
        """The text of one token for display; bytes that are not a complete character as <0xE4>."""
        if not self.is_own(token_id):
            return self.decode([token_id])
        text = self.model.id_to_token(token_id)
        if not self.is_byte_level:
            return readable(text)
        table = byte_of_letter()
        if not all(letter in table for letter in text):
            return text  # an added token
        raw = bytes(table[letter] for letter in text)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(chr(b) if 32 <= b < 127 else f"<0x{b:02X}>" for b in raw)


def read_json_file(folder, config):
    """The tokenizer in tokenizer.json."""
    return FastTokenizer.from_file(str(folder / "tokenizer.json"))


def read_bpe(folder, config):
    """Byte-level BPE from vocab.json and merges.txt. If the vocabulary has RoBERTa's five special tokens, it is RoBERTa's, with
    <s> and </s> around a text; else GPT-2's, with <|endoftext|>. config: tokenizer_config.json as a dict."""
    model = FastTokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    has_prefix = bool(config.get("add_prefix_space", False))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
    model.decoder = decoders.ByteLevel()
    ids = {token: model.token_to_id(token) for token in ROBERTA_SPECIAL}
    if None not in ids.values():
        model.add_special_tokens(list(ids))
        model.post_processor = processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=has_prefix
        )
    elif model.token_to_id(END_OF_TEXT) is not None:
        model.add_special_tokens([END_OF_TEXT])
    return model


def read_wordpiece(folder, config):
    """BERT's WordPiece from vocab.txt. config: tokenizer_config.json as a dict; do_lower_case is true if it is missing."""
    model = FastTokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
    if missing := [token for token in BERT_SPECIAL if model.token_to_id(token) is None]:
        raise ValueError(f"it lacks {', '.join(missing)}, expected BERT's vocabulary")
    model.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece(prefix="##")
    model.add_special_tokens(list(BERT_SPECIAL))
    model.post_processor = processors.BertProcessing(
        ("[SEP]", model.token_to_id("[SEP]")), ("[CLS]", model.token_to_id("[CLS]"))
    )
    return model


def byte_of_letter():
    """{character: byte}: the inverse of the table by which GPT-2's vocabulary shows bytes as printable characters
    (openai/gpt-2, encoder.py)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return {**{chr(b): b for b in shown}, **{chr(256 + i): b for i, b in enumerate(hidden)}}


def readable(piece):
    """A sentencepiece piece for display: spaces in place of ▁, and an ASCII byte piece as its character."""
    byte = re.fullmatch(r"<0x([0-7][0-9A-F])>", piece)
    return chr(int(byte[1], 16)) if byte else piece.replace("▁", " ")


def without_prefix(node):
    """A normalizer or pre_tokenizer of a tokenizer.json without the steps that add or strip a space at the start of a text; None
    if nothing is left of it."""
    if isinstance(node, list):
        return [one for one in map(without_prefix, node) if one is not None]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "Prepend":
        return None
    changes = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    changes["Strip"] = {"strip_left": False}
    lists = {key: without_prefix(value) for key, value in node.items() if isinstance(value, list)}
    return node | lists | changes.get(node.get("type"), {})


def read_sentencepiece(path):
    """The SentencePieceProcessor of a tokenizer.model. Raises NotSentencePiece if it is something else or damaged."""
    content = read_bytes(path)
    if found := other_kind(content):
        raise NotSentencePiece(f"{path} is {found}")
    broken = f"{path} is not a sentencepiece model: damaged, incomplete, or of another kind"
    with silence():
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=content)
            model.id_to_piece(list(range(model.vocab_size())))
        except RuntimeError:
            raise NotSentencePiece(broken) from None
        except UnicodeDecodeError:
            raise NotSentencePiece(f"{broken}: a piece is not UTF-8 text") from None
    return model


def other_kind(content):
    """If the bytes of a file are known not to be a tokenizer: what they are, in words. Else None."""
    if not content.strip():
        return "empty"
    if content.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file; run: git lfs pull"
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
        return "a vocabulary of tiktoken (Llama 3), not of sentencepiece; use the tokenizer.json of the same model"
    return None


@contextmanager
def explained(what, text=None):
    """Context that turns errors of tokenizers and sentencepiece into a ValueError that begins with `what` and `text`. They raise
    bare Exception, and PanicException, which derives from BaseException only."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        what += "" if text is None else f" {short(text)}"
        raise ValueError(f"{what}: {printable(said)[:200]}") from None


@contextmanager
def silence():
    """Context that discards what a library writes directly to file descriptor 2, such as the backtrace of a panic in Rust."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def end_ids(files, say=None):
    """Tuple of the token ids that end a generated text, as in transformers: from generation_config.json, else config.json.

    files: the JsonFolder of a model. say: prints a line about a negative id, which counts as not set."""
    for name in ("generation_config.json", "config.json"):
        ids = read_optional(files, name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if say and min(ids, default=0) < 0:
            say(
                f"{files.path / name}: eos_token_id is {short(min(ids))}, which is not a token id; it counts as not set"
            )
        if ids := [i for i in ids if i >= 0]:
            return tuple(ids)
    return ()


def embedding_rows(files):
    """vocab_size of config.json, or 0 if it is not there. files: the JsonFolder of a model."""
    rows = read_optional(files, "config.json").get("vocab_size")
    return rows if isinstance(rows, int) else 0


def read_optional(files, name):
    """The object in a JSON file, or {} if there is no such file. Raises ValueError if it does not have the shape in SHAPES."""
    return files.json(name, SHAPES[name], is_optional=True)
