"""Text to token ids and back: sentencepiece (tokenizer.model) or tokenizers (tokenizer.json, vocab.*) in one class.

Not here: chat templates and padding. Ids equal those of the libraries to the last one; see tests/test_tokenizer.py."""

import re
from functools import cached_property
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from minitune.files import read_json

END_OF_TEXT = "<|endoftext|>"  # what GPT-2 and Phi end with where no file says so
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BERT_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")


def load_tokenizer(folder):
    """The tokenizer of a model folder: its tokenizer.model, else tokenizer.json, else vocab.json with merges.txt (GPT-2,
    RoBERTa), else vocab.txt (BERT).

    tokenizer.model wins over a tokenizer.json beside it: both are of Llama or Mistral then, sentencepiece is what these
    were trained with, and the converted JSON differs from it in leading and doubled spaces.
    BOS: sentencepiece's own, unless tokenizer_config.json says add_bos_token false. For tokenizer.json it is the one
    token that its post-processor prepends (Llama 3), or bos_token where tokenizer_config.json says add_bos_token true.
    EOS: eos_token of tokenizer_config.json, else eos_token_id of config.json or generation_config.json, else
    sentencepiece's own or <|endoftext|>.
    Raises ValueError with one line on a missing or corrupt file, or a token name without an id."""
    folder = Path(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder)
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",)):
        if all((folder / name).is_file() for name in names):
            return JsonTokenizer(folder)
    raise ValueError(
        f"{folder} has no tokenizer: expected tokenizer.model, tokenizer.json, vocab.json + merges.txt, or vocab.txt"
    )


class Tokenizer:
    """What both kinds share. Attributes:

    vocab_size: 1 + the largest id. bos_id: None where the family takes no BOS (Phi). eos_id: None where no file says.
    eos_ids: every id that ends a generated text, eos_id first. pad_id: a valid id (padding is masked by position)."""

    def __init__(self, folder):
        """Reads the JSON files beside the tokenizer. Each kind then calls finish()."""
        self.folder = folder
        self.config, self.added = read_optional(folder, "tokenizer_config.json"), {}  # id -> (text, is_special)
        try:
            for text, token_id in read_optional(folder, "added_tokens.json").items():
                self.added[int(token_id)] = text, not text.isspace()
            for token_id, token in self.config.get("added_tokens_decoder", {}).items():
                self.added[int(token_id)] = str(token["content"]), bool(token.get("special", False))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}: added_tokens.json or added_tokens_decoder in tokenizer_config.json is not as "
                f"transformers writes it ({type(error).__name__}: {error})"
            ) from None

    def finish(self, bos_id, eos_id):
        """Settle the special ids. bos_id, eos_id: what the tokenizer's own file says, or None."""
        add_bos, stops = self.config.get("add_bos_token"), []
        if add_bos:
            bos_id = self.named("bos_token", bos_id)
        self.bos_id = None if add_bos is False else bos_id
        for name in ("config.json", "generation_config.json"):
            stop = read_optional(self.folder, name).get("eos_token_id")
            stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
            if bad := [i for i in stop if isinstance(i, bool) or not isinstance(i, int) or i < 0]:
                raise ValueError(f"{self.folder / name}: eos_token_id has {bad[0]!r}, expected token ids, 0 or more")
            stops += stop
        self.eos_id = self.named("eos_token", stops[0] if stops else eos_id)
        if self.eos_id is not None and not (self.is_own(self.eos_id) or self.eos_id in self.added):
            raise ValueError(
                f"{self.folder}: eos_token_id is {self.eos_id}, but the tokenizer has no such id; "
                f"its {self.vocab_size} ids are of another model"
            )
        self.eos_ids = list(dict.fromkeys(([] if self.eos_id is None else [self.eos_id]) + stops))
        self.pad_id = 0 if self.eos_id is None else self.eos_id

    def named(self, key, otherwise):
        """The id of what tokenizer_config.json has under `key` (a string or {"content": ...}), else `otherwise`."""
        text = self.config.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if text is None:
            return otherwise
        if not isinstance(text, str):
            raise ValueError(f"{self.folder}/tokenizer_config.json: {key} is {text!r}, expected the text of a token")
        token_id = self.id_of(text)
        if token_id is None:
            raise ValueError(
                f"{self.folder}/tokenizer_config.json names {key} {text!r}, which the tokenizer does not have"
            )
        return token_id

    def encode(self, text, add_bos=True, allow_special=True):
        """Ids of `text`, with BOS first iff add_bos and the family has one; no EOS.

        allow_special: the text of a special token becomes its id, as the libraries do it (never with sentencepiece,
        which does not parse it). False is for rows of data and other text from outside: there it is text like any."""
        if not isinstance(text, str):
            raise ValueError(f"expected text, got {type(text).__name__} {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has half a surrogate pair ({text[error.start]!r}) at character {error.start}; "
                "it is not Unicode text"
            ) from None
        ids = self.encode_text(text, allow_special)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids):
        """Text of `ids`, not cleaned up: special tokens of tokenizer.json stay, sentencepiece has no text for its own.

        Ids that no token has (the model's embedding may have more rows than the tokenizer ids) become U+FFFD."""
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
    """tokenizer.model by sentencepiece. Added tokens beyond its size are decoded; text never becomes one.

    Every call of encode puts the dummy space of Llama and Mistral in front, which decode takes away."""

    def __init__(self, folder):
        super().__init__(folder)
        path = folder / "tokenizer.model"
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError:
            raise ValueError(f"{path} is not a sentencepiece model: corrupt, cut short, or of another kind") from None
        self.size = self.model.vocab_size()
        if not self.size:
            raise ValueError(f"{path} is empty, expected a sentencepiece model")
        self.added = {i: t for i, t in self.added.items() if i >= self.size or self.model.id_to_piece(i) != t[0]}
        self.vocab_size = max([self.size - 1, *self.added]) + 1
        own = [i if i >= 0 else None for i in (self.model.bos_id(), self.model.eos_id())]
        self.finish(*own)

    def id_of(self, text):
        if (found := next((i for i, (content, _) in self.added.items() if content == text), None)) is not None:
            return found
        found = self.model.piece_to_id(text)  # the id of <unk> where there is no such piece
        return found if self.model.id_to_piece(found) == text else None

    def is_own(self, token_id):
        return 0 <= token_id < self.size and token_id not in self.added

    def encode_text(self, text, allow_special):
        return self.model.encode(text)

    def decode_own(self, ids):
        return self.model.decode(ids)

    def piece(self, token_id):
        """One token as a person should see it; a lone byte as <0xE4>."""
        return readable(self.model.id_to_piece(token_id)) if self.is_own(token_id) else self.decode([token_id])


class JsonTokenizer(Tokenizer):
    """tokenizer.json, or vocab.json and merges.txt (GPT-2, RoBERTa), or vocab.txt (BERT), by tokenizers.

    frame: ([ids before], [ids after]) that its post-processor puts around a text: <s> and </s>, [CLS] and [SEP], or
    BOS alone, or none. is_byte_level: whether it is a BPE over bytes, where a word has its space in front."""

    def __init__(self, folder):
        super().__init__(folder)
        read = {"tokenizer.json": read_json_file, "vocab.json": read_bpe, "vocab.txt": read_wordpiece}
        path = next(folder / name for name in read if (folder / name).is_file())
        try:
            self.model = read[path.name](folder, self.config)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} cannot be read as a tokenizer: {str(error).splitlines()[0]}") from None
        self.model.no_truncation()  # a saved file may hold the settings of somebody's training run
        self.model.no_padding()
        for token_id, (text, is_special) in sorted(self.added.items()):
            if self.model.token_to_id(text) is None:
                self.model.add_tokens([AddedToken(text, special=is_special, normalized=not is_special)])
            if self.model.token_to_id(text) != token_id:
                raise ValueError(
                    f"{folder} gives {text!r} the id {token_id} in tokenizer_config.json or "
                    f"added_tokens.json, but {path.name} gives it {self.model.token_to_id(text)}; "
                    "one of them is of another model"
                )
        self.added = {}
        self.vocab_size = 1 + max(self.model.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise ValueError(f"{path} has an empty vocabulary")
        self.is_byte_level = "ByteLevel" in repr(self.model.decoder)
        wrapped = self.model.encode("a")
        inner = [i for i, special in enumerate(wrapped.special_tokens_mask) if not special] or [0]
        prefix = wrapped.ids[: inner[0]]
        self.frame = prefix, wrapped.ids[inner[-1] + 1 :]
        if len(prefix) > 1:
            raise ValueError(f"{path} puts the {len(prefix)} tokens {prefix} before a text; expected one BOS or none")
        self.finish(prefix[0] if prefix else None, self.id_of(END_OF_TEXT))

    @cached_property
    def plain(self):
        """A second tokenizer that reads the text of special tokens, and of BOS and EOS in any case, as plain text."""
        plain = FastTokenizer.from_str(self.model.to_str())
        ends = {self.model.id_to_token(i) for i in (self.bos_id, *self.eos_ids) if i is not None} - {None}
        plain.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in sorted(ends)])
        plain.encode_special_tokens = True
        return plain

    def id_of(self, text):
        return self.model.token_to_id(text)

    def is_own(self, token_id):
        return self.model.id_to_token(token_id) is not None if token_id >= 0 else False

    def encode_text(self, text, allow_special):
        return (self.model if allow_special else self.plain).encode(text, add_special_tokens=False).ids

    def encode_framed(self, text, max_length=None):
        """Ids of `text` with the tokens that an encoder expects around it, <s> ... </s> or [CLS] ... [SEP]. max_length:
        tokens with these; what is beyond is cut from the end of the text."""
        before, after = self.frame
        ids = self.encode(text, add_bos=False)
        if max_length is not None:
            ids = ids[: max(0, max_length - len(before) - len(after))]
        return [*before, *ids, *after]

    def decode_own(self, ids):
        return self.model.decode(ids, skip_special_tokens=False)

    def piece(self, token_id):
        """One token as a person should see it; bytes that are no whole character as <0xE4>."""
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
    return FastTokenizer.from_file(str(folder / "tokenizer.json"))


def read_bpe(folder, config):
    """Byte-level BPE from vocab.json and merges.txt: RoBERTa's where the vocabulary has its five special tokens, which a
    text then stands between; else GPT-2's, with <|endoftext|>. config: tokenizer_config.json as a dict."""
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
    """BERT's WordPiece from vocab.txt. config: tokenizer_config.json, whose do_lower_case is true where it is silent."""
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
    """GPT-2's table from the printable letters in its vocabulary back to bytes (openai/gpt-2, encoder.py)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return {**{chr(b): b for b in shown}, **{chr(256 + i): b for i, b in enumerate(hidden)}}


def readable(piece):
    """A sentencepiece piece with spaces for ▁ and an ASCII byte piece as its character."""
    byte = re.fullmatch(r"<0x([0-7][0-9A-F])>", piece)
    return chr(int(byte[1], 16)) if byte else piece.replace("▁", " ")


def read_optional(folder, name):
    """The object in a JSON file, {} where there is no such file. Raises ValueError where it is not an object."""
    path = folder / name
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value
