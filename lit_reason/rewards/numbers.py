"""Numbers in text, read with regular expressions into exact fractions. Nothing is evaluated.

Accepted: `5` `+5` `-5` `−5` (unicode minus) `5.` `5.0` `.5` `1,234` `1,234.50` `$5` `-$5` `$-5` `3/4` `70%`, and
`1.5e3` when asked for. Not numbers: `1,23` (no such grouping), `007` (a code, not a quantity), `1/0`, `inf`, anything
over 100 characters. A percentage is a kind of its own: `70%` equals neither `70` nor `0.7`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

MAX_CHARS = 100
MAX_EXPONENT = 99

_MINUS = str.maketrans({"\u2212": "-", "\ufe63": "-", "\uff0d": "-"})
# Possessive quantifiers (++, ?+): a failed match never tries shorter runs of digits, so matching is linear.
_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})++|0(?![0-9])|[1-9][0-9]*+)"
_UNSIGNED = rf"(?:{_INTEGER}(?:\.[0-9]++)?+|\.[0-9]++)"
_NUMBER = rf"(?P<sign>(?:(?<![)\]])[+-])?)(?P<cur>\$?)(?P<sign2>(?<=\$)[+-]|)(?P<value>{_UNSIGNED})"
_WHOLE = re.compile(rf"{_NUMBER}(?:[eE](?P<exp>[+-]?[0-9]++))?+(?:\s?/\s?(?P<den>{_UNSIGNED}))?+\s?(?P<pct>%?)\.?")
# In running text a number neither starts nor ends inside a word, a longer number, a date or a version.
_IN_TEXT = re.compile(rf"(?<![\w.,/]){_NUMBER}(?:/(?P<den>{_UNSIGNED}))?+(?P<pct>%?)(?![\w/]|[.,][0-9])")


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value; two are equal when value and kind are."""

    value: Fraction
    percent: bool = False


def parse_number(text: str, scientific: bool = False) -> Number | None:
    """The number that `text` as a whole is, None if it is not one.

    Example::

        >>> parse_number(" $1,234.50 ")
        Number(value=Fraction(2469, 2), percent=False)
        >>> parse_number("12 apples") is None
        True

    Args:
        text: e.g. the text inside the answer tags; surrounding space and one final "." are ignored.
        scientific: whether `1.5e3` is a number (exponents to 99).
    """
    text = text.strip()
    if len(text) > MAX_CHARS:
        return None
    match = _WHOLE.fullmatch(text.translate(_MINUS))
    if match is None or (match["exp"] and not scientific):
        return None
    return _build(match, match["exp"] or "0")


def last_number(text: str) -> Number | None:
    """The last number in running text: `last_number("so 3 + 4 = 7.")` is 7; in `"7-3"` the minus is no sign."""
    found = None
    for match in _IN_TEXT.finditer(text.translate(_MINUS)):
        found = match
    if found is None or len(found[0]) > MAX_CHARS:
        return None
    return _build(found, "0")


def _build(match: re.Match[str], exponent: str) -> Number | None:
    if len(exponent) > 4 or abs(int(exponent)) > MAX_EXPONENT or (match["sign"] and match["sign2"]):
        return None
    value = _fraction(match["value"]) * Fraction(10) ** int(exponent)
    if match["den"]:
        denominator = _fraction(match["den"])
        if denominator == 0:
            return None
        value /= denominator
    return Number(-value if "-" in (match["sign"], match["sign2"]) else value, percent=bool(match["pct"]))


def _fraction(digits: str) -> Fraction:
    return Fraction(Decimal(digits.replace(",", "")))


def same_answer(got: str, want: str, ignore_case: bool = False) -> bool:
    """Whether two answers are the same: as numbers when `want` is one, else as text with its spaces squeezed.

    Example::

        >>> [same_answer(got, "1234") for got in ("1,234", "$1234.00", "1234 apples")]
        [True, True, False]
    """
    number = parse_number(want)
    if number is not None:
        return parse_number(got) == number
    got, want = " ".join(got.split()), " ".join(want.split())
    return got.casefold() == want.casefold() if ignore_case else got == want
