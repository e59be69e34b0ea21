"""From a row to token ids and labels."""

from dataclasses import dataclass

from minitune.formats.rows import segments
from minitune.formats.templates import BOS, EOS

IGNORED = -100  # the label of a token that is not supervised


class NoAnswer(ValueError):
    """A row whose answer is blank, so that it has no supervised token."""


@dataclass(frozen=True)
class Example:
    """One tokenised row. labels[t] is the label of token t (not shifted), or IGNORED if the token is not supervised."""

    ids: list[int]
    labels: list[int]
    row: int  # index in the file, from 0
    prompt_length: int  # number of tokens before the answer, BOS included


def encode_row(row, tokenizer, row_format, number=0, loss_on="answer", special_text="text"):
    """A row as an Example of BOS, prompt, answer and end token. It is not truncated.

    number: index of the row in the file. The ids are those of the row as one text, see Tokenizer.encode_pieces(). The answer and
    the end token are supervised; with loss_on "all" everything but BOS. special_text "text": the text of a special token is
    plain text; "tokens": it becomes the token's id, and a row that has its own BOS or end token gets no second one.
    Raises NoAnswer if the answer is blank, ValueError if a value is not text or the tokenizer has no end token."""
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer names no end token; set eos_token in tokenizer_config.json")
    parts = segments(row, row_format)
    if any(is_answer and not text.strip() for text, is_answer in parts):
        raise NoAnswer("it has no supervised token, since its answer is blank")
    pieces = [(BOS, False), *parts, (EOS, True)]  # (piece, whether it belongs to the answer)
    if special_text == "tokens":
        pieces = [(new, is_answer) for piece, is_answer in pieces for new in split_special(piece, tokenizer)]
        pieces = once(pieces, tokenizer)
    ids, labels, prompt_length = [], [], 0
    for i, new in enumerate(tokenizer.encode_pieces([piece for piece, _ in pieces])):
        is_answer = pieces[i][1]
        ids += new
        labels += new if is_answer or (loss_on == "all" and i > 0) else [IGNORED] * len(new)
        prompt_length += 0 if is_answer else len(new)
    return Example(ids, labels, number, prompt_length)


def split_special(piece, tokenizer):
    """A text split into texts and ids of special tokens; another piece as a list of itself."""
    return tokenizer.split_special(piece) if isinstance(piece, str) else [piece]


def once(pieces, tokenizer):
    """`pieces` of a row, [(piece, is_answer), ...], without a second BOS at the start and a second end token at the end."""
    is_blank = lambda piece: isinstance(piece, str) and not piece.strip()
    at = next((i for i, (piece, _) in enumerate(pieces) if piece is not BOS and not is_blank(piece)), 0)
    if pieces[0][0] is BOS and pieces[at][0] == tokenizer.bos_id is not None:
        pieces = [pieces[0], *pieces[at + 1 :]]
    if pieces[-1][0] is EOS:
        at = max((i for i, (piece, _) in enumerate(pieces[:-1]) if not is_blank(piece)), default=0)
        if pieces[at][0] in tokenizer.eos_ids and pieces[at][1]:
            pieces = pieces[: at + 1]
    return pieces


def read_special(pieces, tokenizer):
    """The pieces of a conversation, with the text of special tokens replaced by their ids, and only one BOS."""
    split = [(new, False) for piece in pieces for new in split_special(piece, tokenizer)]
    return [piece for piece, _ in once(split, tokenizer)]


def count_supervised(labels):
    """Number of tokens of one row that are predicted and have a label. The first token of a row is never predicted."""
    return sum(label != IGNORED for label in labels[1:])
