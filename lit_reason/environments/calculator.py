"""Exact arithmetic on text, by a parser of its own: nothing is evaluated, and what would take long is refused.

sum     = product (("+" | "-") product)*
product = signed (("*" | "/" | "//" | "%") signed)*
signed  = ("+" | "-")* power
power   = atom ["**" signed]            right to left, as in Python: -2**2 is -4, 2**3**2 is 512
atom    = number | "(" sum ")"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|(\*\*|//|[-+*/%()]))")
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"})
MAX_CHARS, MAX_DEPTH, MAX_BITS = 256, 32, 512


class ArithmeticRefused(ValueError):
    """The text is no arithmetic, has no value, or is too large; the message is for the model to read."""


class Calculator:
    """A tool: `12*7` -> `84`, `1/3 + 1/6` -> `1/2`, `0.1+0.2` -> `0.3`, `1/0` -> `error: division by zero`."""

    def __call__(self, requests: Sequence[str]) -> list[str]:
        return [self.answer(request) for request in requests]

    @staticmethod
    def answer(request: str) -> str:
        """The value as text, or `error: ...`."""
        try:
            return as_text(calculate(request))
        except ArithmeticRefused as error:
            return f"error: {error}"


def calculate(text: str) -> Fraction:
    """The exact value of an expression in + - * / // % ** and brackets, of integers and decimals.

    Raises ArithmeticRefused, in bounded time, for anything else: 9**9**9**9 is refused before it is computed.
    """
    if len(text) > MAX_CHARS:
        raise ArithmeticRefused(f"longer than {MAX_CHARS} characters")
    return _Parser(_tokens(text.translate(_SPELLINGS))).value()


def as_text(value: Fraction) -> str:
    """`84`, `-0.25` where the decimals end within 12 places, else `22/7`."""
    scaled = value * 10**12
    if value.denominator == 1 or scaled.denominator != 1:
        return str(value)
    whole, part = divmod(abs(scaled.numerator), 10**12)
    return f"{'-' if value < 0 else ''}{whole}.{part:012d}".rstrip("0")


def _tokens(text: str) -> list[str]:
    tokens, place, text = [], 0, text.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ArithmeticRefused(f"cannot read {text[place:].strip()[:12]!r}")
        tokens.append(found[1] or found[2])
        place = found.end()
    return tokens


class _Parser:
    """Recursive descent; the depth counts every nested call, so that no text can exhaust the stack."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0

    def value(self) -> Fraction:
        value = self.sum()
        if self.place < len(self.tokens):
            raise ArithmeticRefused(f"unexpected {self.tokens[self.place]!r}")
        return value

    def take(self, *wanted: str) -> str | None:
        """The next token, taken, if it is one of `wanted`."""
        if self.place < len(self.tokens) and self.tokens[self.place] in wanted:
            self.place += 1
            return self.tokens[self.place - 1]
        return None

    def sum(self) -> Fraction:
        value = self.product()
        while sign := self.take("+", "-"):
            right = self.product()
            value = _bounded(value + right if sign == "+" else value - right)
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while sign := self.take("*", "/", "//", "%"):
            right = self.signed()
            if sign != "*" and right == 0:
                raise ArithmeticRefused("division by zero")
            value = _bounded(_PRODUCTS[sign](value, right))
        return value

    def signed(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ArithmeticRefused(f"nested deeper than {MAX_DEPTH}")
        sign = self.take("+", "-")
        value = self.power() if sign is None else self.signed()
        self.depth -= 1
        return -value if sign == "-" else value

    def power(self) -> Fraction:
        base = self.atom()
        return _power(base, self.signed()) if self.take("**") else base

    def atom(self) -> Fraction:
        if self.take("("):
            value = self.sum()
            if not self.take(")"):
                raise ArithmeticRefused("a bracket is not closed")
            return value
        if self.place == len(self.tokens):
            raise ArithmeticRefused("the expression is not complete")
        token = self.tokens[self.place]
        if not token[-1].isdigit() and not token[0].isdigit():
            raise ArithmeticRefused(f"unexpected {token!r}")
        self.place += 1
        return _bounded(Fraction(token))


_PRODUCTS = {
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right,
    "//": lambda left, right: Fraction(left // right),
    "%": lambda left, right: left % right,
}


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ArithmeticRefused("an exponent must be a whole number")
    if base == 0 and exponent < 0:
        raise ArithmeticRefused("division by zero")
    if abs(base) <= 1 and base.denominator == 1:  # -1, 0, 1: of any exponent
        return base if exponent % 2 or (base == 0 and exponent) else Fraction(1)
    if _bits(base) * abs(exponent) > 2 * MAX_BITS:  # the result has at least half as many bits
        raise ArithmeticRefused("too large")
    return _bounded(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise ArithmeticRefused("too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
