"""Checks the content of JSON files. A reader describes the shape of its file as plain data:

PERSON = {"name": str, "age?": Number(0, 150), "tags": [str]}
check(json, PERSON, "people.json, line 3")      # ValueError: people.json, line 3: tags[0] is 5, expected text"""

import math
from dataclasses import dataclass

from minitune.screen import short

WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


@dataclass(frozen=True)
class Number:
    """A finite number from low to high, both included. is_whole: only an int."""

    low: float = -math.inf
    high: float = math.inf
    is_whole: bool = False


COUNT = Number(0, 2**63 - 1, is_whole=True)
TOKEN_ID = Number(0, 2**31 - 1, is_whole=True)


def check(value, shape, where):
    """Return `value` if it has the shape. Else raises ValueError with `where`, the place in the value, what is there and what
    was expected.

    where: name of the file or line, for the message. shape: a type (a bool is no int or float; float accepts an int and must
    be finite), None, a Number, a set of allowed values, a tuple of alternatives, [shape] for a list of it, {str: shape} for an
    object with any keys, or {"key": shape, "key?": shape} for an object in which a key with ? may be missing. Keys that the
    shape does not name are accepted."""
    if found := misfit(value, shape, ""):
        place, bad, expected = found
        bad = "missing" if bad is MISSING else short(bad)
        raise ValueError(f"{where}: {place.lstrip('.') or 'it'} is {bad}, expected {words(expected)}")
    return value


MISSING = object()


def misfit(value, shape, place):
    """(place, the value or MISSING, expected shape) of the first value that does not fit; None if all fit."""
    wrong = place, value, shape
    if isinstance(shape, tuple):
        found = [misfit(value, one, place) for one in shape]
        deeper = [one for one in found if one is not None and one[0] != place]
        return None if None in found else (deeper or [wrong])[0]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return wrong
        return next(filter(None, (misfit(item, shape[0], f"{place}[{i}]") for i, item in enumerate(value))), None)
    if isinstance(shape, dict):
        return misfit_object(value, shape, place)
    if isinstance(shape, Number):
        is_number = isinstance(value, int if shape.is_whole else (int, float)) and not isinstance(value, bool)
        return None if is_number and math.isfinite(bounded(value)) and shape.low <= value <= shape.high else wrong
    if isinstance(shape, (set, frozenset)):
        is_plain = value is None or isinstance(value, (str, int, float))
        return None if is_plain and any(value == one and type(value) is type(one) for one in shape) else wrong
    if shape is None:
        return None if value is None else wrong
    if shape is float:
        return misfit(value, Number(), place)
    return None if isinstance(value, shape) and isinstance(value, bool) == (shape is bool) else wrong


def misfit_object(value, shape, place):
    """misfit() for a shape that is a dict."""
    if not isinstance(value, dict):
        return place, value, shape
    if set(shape) == {str}:
        for key, inner in value.items():
            if misfit(inner, shape[str], ""):
                return misfit(inner, shape[str], f"{place}.{short(key)}")
        return None
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if name not in value:
            if name == key:
                return f"{place}.{name}", MISSING, inner
        elif found := misfit(value[name], inner, f"{place}.{name}"):
            return found
    return None


def bounded(value):
    """The number, with an int clipped to the range of a float: math.isfinite() fails on a larger one."""
    return value if isinstance(value, float) else min(max(value, -(2**70)), 2**70)


def words(shape):
    """A shape as the words of an error message: "a whole number from 1 to 8"."""
    if isinstance(shape, tuple):
        return " or ".join(dict.fromkeys(map(words, shape)))
    if isinstance(shape, list):
        return f"a list, each {words(shape[0])}"
    if isinstance(shape, dict):
        return "an object"
    if isinstance(shape, Number):
        noun = "a whole number" if shape.is_whole else "a finite number"
        low, high = (bound_words(bound) for bound in (shape.low, shape.high))
        if low and high:
            return f"{noun} from {low} to {high}"
        return f"{noun}, {low} or more" if low else f"{noun}, at most {high}" if high else noun
    if isinstance(shape, (set, frozenset)):
        return f"one of {', '.join(sorted(map(str, shape)))}"
    return "null" if shape is None else WORDS[shape]


def bound_words(bound):
    return None if math.isinf(bound) else f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
