"""Detects texts in scripts that the word-based metrics cannot split into words."""

import re

# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters.
SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)


def is_outside_ascii(text):
    """Whether more than half of the letters and digits are outside of a-z, A-Z and 0-9, and so ignored by ROUGE's words."""
    if text.isascii():
        return False
    letters = [letter for letter in text.lower() if letter.isalnum()]
    return 2 * sum(not letter.isascii() for letter in letters) > len(letters)


def is_without_spaces(text, words=None):
    """Whether more than half of the letters belong to scripts without spaces between words, so that splitting at white space
    gives whole sentences.

    words: the text split by a tokeniser, or None. A letter that is a word by itself is not counted: the tokeniser can split
    it."""
    if text.isascii():
        return False
    read = sum(len(word) == 1 and SPACELESS.match(word) is not None for word in words or ())
    return 2 * (len(SPACELESS.findall(text)) - read) > sum(map(str.isalnum, text))
