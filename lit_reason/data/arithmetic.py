"""Integer arithmetic written out: one line per operation, and a parser that reduces an expression line by line.

A `Writer` turns one operation `a op b` into a line of thought. `plain` states the result, `columns` also shows the
digit work with its carries, right to left.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from lit_reason.errors import DataError

Writer = Callable[[int, str, int], str]
_TOKEN = re.compile(r"\s*(\d+|//|[-+*/()])")


def apply(a: int, op: str, b: int) -> int:
    """`a op b`; `/` rounds down, as the arithmetic tasks of reasoning-gym define it."""
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    if b == 0:
        raise DataError(f"division by zero in {a}/{b}")
    return a // b


def plain(a: int, op: str, b: int) -> str:
    """`"12+7=19"`."""
    return f"{a}{op}{b}={apply(a, op, b)}"


def columns(a: int, op: str, b: int) -> str:
    """Digit by digit from the right, carries and borrows in place; `*` and `/` as `plain`.

    Example::

        >>> columns(58, "+", 67)
        '58+67:8+7=15,5+6+1=12=125'
        >>> columns(53, "-", 27)
        '53-27:13-7=6,5-2-1=2=26'
        >>> columns(19, "-", 30)  # the smaller from the larger, then the sign
        '19-30:10-9=1,3-1-1=1=-11'
    """
    if op not in ("+", "-"):
        return plain(a, op, b)
    signed = b if op == "+" else -b
    if (a < 0) == (signed < 0):
        work = _add_columns(abs(a), abs(signed))
    else:
        work = _subtract_columns(max(abs(a), abs(signed)), min(abs(a), abs(signed)))
    return f"{a}{op}{b}:{work}={a + signed}"


def _add_columns(a: int, b: int) -> str:
    steps, carry = [], 0
    for x, y in _digit_pairs(a, b):
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ",".join(steps)


def _subtract_columns(a: int, b: int) -> str:
    steps, borrow = [], 0
    for x, y in _digit_pairs(a, b):
        lent = 10 if x - y - borrow < 0 else 0
        steps.append(f"{x + lent}-{y}{'-1' if borrow else ''}={x + lent - y - borrow}")
        borrow = 1 if lent else 0
    return ",".join(steps)


def _digit_pairs(a: int, b: int) -> list[tuple[int, int]]:
    """Digits of both, least significant first, the shorter filled with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1], strict=True)]


class _Reduction:
    """Recursive descent over `sum := product (+|- product)*`, `product := unary (*|/ unary)*`,
    `unary := -unary | number | (sum)`, noting every operation in the order in which it is done."""

    def __init__(self, text: str, write: Writer, exact: bool) -> None:
        self.tokens = _tokens(text)
        self.text, self.write, self.exact = text, write, exact
        self.at = 0
        self.lines: list[str] = []

    def run(self) -> int:
        value = self._chain("+-", self._product)
        if self.at != len(self.tokens):
            raise self._error()
        return value

    def _product(self) -> int:
        return self._chain("*/", self._unary)

    def _chain(self, operators: str, operand: Callable[[], int]) -> int:
        value = operand()
        while self._peek() and self._peek() in operators:
            op = self._take()
            value = self._do(value, op, operand())
        return value

    def _do(self, a: int, op: str, b: int) -> int:
        result = apply(a, op, b)
        if self.exact and op == "/" and Fraction(a, b) != result:
            raise DataError(f"{a}/{b} in {self.text!r} is no whole number")
        self.lines.append(self.write(a, op, b))
        return result

    def _unary(self) -> int:
        token = self._peek()
        if token == "-":
            self._take()
            inner = self._peek()
            value = -self._unary()
            if inner == "(":
                self.lines.append(f"-({-value})={value}")
            return value
        if token == "(":
            self._take()
            value = self._chain("+-", self._product)
            if self._peek() != ")":
                raise self._error()
            self._take()
            return value
        if not token.isdigit():
            raise self._error()
        return int(self._take())

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def _error(self) -> DataError:
        rest = " ".join(self.tokens[self.at :]) or "the end"
        return DataError(f"cannot read {self.text!r} at {rest!r}; expected whole numbers, + - * / and parentheses")


def reduce_expression(text: str, write: Writer = plain, exact: bool = False) -> tuple[list[str], int]:
    """Lines of the reduction in the order of evaluation, and the value.

    Args:
        text: whole numbers, `+ - * /`, unary minus, parentheses.
        write: how to write one operation.
        exact: a division that leaves a remainder is an error; otherwise it rounds down.

    Example::

        >>> reduce_expression("( 56 + -33 ) - 84")
        (['56+-33=23', '23-84=-61'], -61)
    """
    reduction = _Reduction(text, write, exact)
    value = reduction.run()
    return reduction.lines, value


def _tokens(text: str) -> list[str]:
    tokens, at, text = [], 0, text.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise DataError(f"cannot read {text[at:]!r}; expected whole numbers, + - * / and parentheses")
        tokens.append("/" if match[1] == "//" else match[1])
        at = match.end()
    return tokens
