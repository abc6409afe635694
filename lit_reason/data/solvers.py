"""Worked solutions for the shipped tasks, short enough for a byte-level model: the thoughts that prime a policy.

A solver gets the prompt and a `Writer` and returns (lines of thought, answer). A prompt that carries its own
`meta["thought"]` (GSM8K, a user's JSONL) is solved by that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from lit_reason.data.arithmetic import Writer, columns, plain, reduce_expression
from lit_reason.errors import ConfigError, DataError, nearest
from lit_reason.types import Prompt

Solution = tuple[list[str], str]
STYLES: dict[str, Writer] = {"steps": plain, "columns": columns}
_EXPRESSION = re.compile(r"-?[\d(][\d\s()+*/-]*")


def solve(prompt: Prompt, style: str = "steps") -> tuple[str, str] | None:
    """(thought, answer), or None when nobody knows how to solve prompts of this source.

    Args:
        style: `"steps"` (`12+7=19`) or `"columns"` (sums digit by digit with carries).
    """
    if style not in STYLES:
        raise ConfigError(f"got style={style!r}; {nearest(style, STYLES)}")
    if "thought" in prompt.meta:
        return str(prompt.meta["thought"]), prompt.answer
    solver = SOLVERS.get(prompt.source.removeprefix("reasoning_gym/"))
    if solver is None:
        return None
    lines, answer = solver(prompt, STYLES[style])
    if answer != prompt.answer:
        raise DataError(
            f"the worked solution of {prompt.question!r} ends in {answer}, but {prompt.source} says {prompt.answer}; "
            "one of them is wrong, so this prompt cannot be used for priming"
        )
    return "\n".join(lines), answer


def solve_expression(prompt: Prompt, write: Writer) -> Solution:
    """chain_sum, basic_arithmetic: running totals in the order of evaluation."""
    text = fact(prompt, "expression") or _find_expression(prompt.question)
    lines, value = reduce_expression(text, write)
    return lines or [str(value)], str(value)


def solve_product(prompt: Prompt, write: Writer) -> Solution:
    """products: one factor at a time, each digit of the shorter factor by itself, then the partial sums.

    `205 * 38` reads `205*8=1640`, `205*30=6150`, `1640+6150=7790`.
    """
    text = fact(prompt, "expression") or _find_expression(prompt.question)
    factors = [int(part) for part in text.split("*")]
    lines, total = [], factors[0]
    for factor in factors[1:]:
        steps, total = _multiply(total, factor, write)
        lines += steps
    return lines or [str(total)], str(total)


def _multiply(a: int, b: int, write: Writer) -> tuple[list[str], int]:
    if len(str(abs(a))) < len(str(abs(b))):
        a, b = b, a
    sign = -1 if b < 0 else 1
    digits = str(abs(b))[::-1]
    parts = [sign * int(digit) * 10**place for place, digit in enumerate(digits) if digit != "0"] or [0]
    lines, total = [write(a, "*", parts[0])], a * parts[0]
    for part in parts[1:]:
        lines += [write(a, "*", part), write(total, "+", a * part)]
        total += a * part
    return lines, total


def solve_gcd(prompt: Prompt, write: Writer) -> Solution:
    """gcd: Euclid's pairs (`780 461`, `461 319`, ..., `1 0`), the result carried to the next number."""
    lines, result = _euclid(_numbers(prompt))
    return lines, str(result)


def _euclid(numbers: list[int]) -> tuple[list[str], int]:
    result, lines = numbers[0], []
    for number in numbers[1:]:
        a, b = max(result, number), min(result, number)
        lines.append(f"{a} {b}")
        while b:
            a, b = b, a % b
            lines.append(f"{a} {b}")
        result = a
    return lines or [str(result)], result


def solve_lcm(prompt: Prompt, write: Writer) -> Solution:
    """lcm: Euclid's pairs, then `a / gcd * b`."""
    numbers = _numbers(prompt)
    result, lines = numbers[0], []
    for number in numbers[1:]:
        pairs, divisor = _euclid([result, number])
        quotient = result // divisor
        lines += [*pairs, write(result, "/", divisor), write(quotient, "*", number)]
        result = math.lcm(result, number)
    return lines or [str(result)], str(result)


def solve_countdown(prompt: Prompt, write: Writer) -> Solution:
    """countdown: the reference expression, worked out to the target; the answer is the expression."""
    lines, value = reduce_expression(prompt.answer, write, exact=True)
    target = fact(prompt, "target")
    if target is not None and value != int(target):
        raise DataError(f"the reference {prompt.answer!r} makes {value}, not the target {target}")
    return lines, prompt.answer


SOLVERS: dict[str, Callable[[Prompt, Writer], Solution]] = {
    "chain_sum": solve_expression,
    "basic_arithmetic": solve_expression,
    "products": solve_product,
    "gcd": solve_gcd,
    "lcm": solve_lcm,
    "countdown": solve_countdown,
}


def fact(prompt: Prompt, key: str) -> Any:
    """A value of the reasoning-gym entry's metadata; None where the prompt has no entry."""
    entry = prompt.meta.get("reasoning_gym", {}).get("entry", {})
    return entry.get("metadata", {}).get(key)


def _find_expression(question: str) -> str:
    found = max(_EXPRESSION.findall(question), key=len, default="")
    if not found.strip():
        raise DataError(f"no arithmetic expression in the question {question!r}")
    return found.strip()


def _numbers(prompt: Prompt) -> list[int]:
    numbers = fact(prompt, "numbers") or re.findall(r"\d+", prompt.question)
    if not numbers:
        raise DataError(f"no numbers in the question {prompt.question!r}")
    return [int(number) for number in numbers]
