"""Which texts a metric cannot read, since its words have no place for their letters."""

import re

# Scripts that put no space between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters.
SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)


def is_outside_ascii(text):
    """Whether more than half of the letters and digits are none of a-z and 0-9, in any case: ROUGE's words leave them out."""
    if text.isascii():
        return False
    letters = [letter for letter in text.lower() if letter.isalnum()]
    return 2 * sum(not letter.isascii() for letter in letters) > len(letters)


def is_without_spaces(text, words=None):
    """Whether more than half of the letters are of scripts without spaces between words: white space leaves a sentence whole.

    words: those that a tokeniser makes of the text; a letter that is a word of its own is read."""
    if text.isascii():
        return False
    read = sum(len(word) == 1 and SPACELESS.match(word) is not None for word in words or ())
    return 2 * (len(SPACELESS.findall(text)) - read) > sum(map(str.isalnum, text))
