"""Against Python's own arithmetic on exact fractions."""

import random
import re
import time
from fractions import Fraction

import pytest

from lit_reason.environments import Calculator, calculate
from lit_reason.environments.calculator import MAX_BITS, ArithmeticRefused, as_text


def expression(rng, depth):
    """A random expression of small numbers, some of it without a value."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([str(rng.randrange(20)), f"{rng.randrange(10)}.{rng.randrange(100):02d}"])
    kind = rng.randrange(8)
    if kind == 0:
        return f"-{expression(rng, depth - 1)}"
    if kind == 1:
        return f"({expression(rng, depth - 1)})**{rng.choice(['2', '-1', '3', '-2'])}"
    operator = rng.choice(["+", "-", "*", "/", "%"])  # `//` makes ints, whose division is no Fraction's
    left, right = expression(rng, depth - 1), expression(rng, depth - 1)
    return f"({left}){operator} {right}" if kind == 2 else f"{left} {operator}{right}"


def test_values_are_those_of_python_on_fractions():
    rng, valued = random.Random(0), 0
    for _ in range(600):
        text = expression(rng, 4)
        exact = re.sub(r"(?<!\*\*)(?<!\*\*-)(?<![\d.])(\d+(?:\.\d+)?)", r"Fraction('\1')", text)
        try:
            expected = eval(exact, {"Fraction": Fraction})
        except ZeroDivisionError:
            with pytest.raises(ArithmeticRefused, match="division by zero"):
                calculate(text)
            continue
        try:
            got = calculate(text)
        except ArithmeticRefused as error:
            assert str(error) == "too large"
            continue
        assert got == expected, text
        valued += 1
    assert valued > 450


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12*7", "84"), ("7//2", "3"), ("-7//2", "-4"), ("7.5//-2", "-4"), ("1/3 + 1/6", "0.5"), 
        ("22/7", "22/7"), ("0.1+0.2", "0.3"), ("-1/8", "-0.125"), ("-2**2", "-4"),
        ("2**3**2", "512"), ("2^10", "1024"), ("6 × 7 ÷ 2 − 1", "20"), ("--3", "3"), ("0**0", "1"), ("0**99999", "0"),
        ("(-1)**1234567890123", "-1"), ("1e3", "error: cannot read 'e3'"),
        ("", "error: the expression is not complete"),
        ("(1+2", "error: a bracket is not closed"), ("1 2", "error: unexpected '2'"), 
        ("2**0.5", "error: an exponent must be a whole number"),
        ("0**-1", "error: division by zero"), ("__import__('os')", "error: cannot read \"__import__('\""),
    ],
)  # fmt: skip
def test_answers(text, answer):
    assert Calculator()([text]) == [answer]


def test_decimals_are_written_only_where_they_end():
    assert as_text(Fraction(1, 2**12)) == "0.000244140625" and as_text(Fraction(1, 2**13)) == "1/8192"


@pytest.mark.parametrize(
    "text", ["9**9**9**9", "9**9**9", "(9**99)**99", "2**-99999999", "1.01**99999999", "9" * 200 + "**3"]
)
def test_what_is_too_large_is_refused_at_once(text):
    start = time.perf_counter()
    assert Calculator()([text]) == ["error: too large"]
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("text", ["(" * 200 + "1", "-" * 200 + "1", "2**" * 80 + "1", "1+" * 200 + "1"])
def test_no_text_exhausts_the_stack(text):
    assert Calculator()([text])[0].startswith("error: ")


def test_the_largest_value_fits():
    assert calculate(f"2**{MAX_BITS - 1}") == 2 ** (MAX_BITS - 1)
    with pytest.raises(ArithmeticRefused):
        calculate(f"2**{MAX_BITS}")
