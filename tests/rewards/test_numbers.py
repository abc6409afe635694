import random
import time
from fractions import Fraction

import pytest

from lit_reason.rewards import last_number, parse_number, same_answer

NUMBERS = {
    "5": 5,
    "+5": 5,
    "-5": -5,
    "\u22125": -5,
    "\uff0d5": -5,
    "5.": 5,
    "5.0": 5,
    " 5 ": 5,
    "\n5\n": 5,
    ".5": Fraction(1, 2),
    "0": 0,
    "-0": 0,
    "0.0": 0,
    "0.50": Fraction(1, 2),
    "1,234": 1234,
    "1234": 1234,
    "1,234,567.": 1234567,
    "1,234.50": Fraction(2469, 2),
    "$5": 5,
    "$5.00": 5,
    "-$5": -5,
    "$-5": -5,
    "+$1,000": 1000,
    "3/4": Fraction(3, 4),
    "-3/4": Fraction(-3, 4),
    "3 / 4": Fraction(3, 4),
    "1.5/3": Fraction(1, 2),
    "100000000000000000001": 10**20 + 1,
}
NOT_NUMBERS = [
    "",
    " ",
    "-",
    "+",
    "$",
    ".",
    "%",
    "five",
    "12 apples",
    "5 5",
    "1,23",
    "12,34,567",
    "1234,567",
    ",5",
    "5,",
    "1,,234",
    "007",
    "01",
    "5..",
    "1.2.3",
    "--5",
    "+-5",
    "-$-5",
    "1/0",
    "1/2/3",
    "/4",
    "3/",
    "inf",
    "-inf",
    "nan",
    "Infinity",
    "1e3",
    "1_000",
    "0x10",
    "0b1",
    "1j",
    "٣",
    "²",
    "½",
    "Ⅳ",
    "2+3",
    "2*3",
    "9**9",
    "(5)",
    "[5]",
    "__import__('os')",
    "5;6",
    "5=5",
    "2/3/2020",
]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_read_exactly(text):
    number = parse_number(text)
    assert number is not None and number.value == NUMBERS[text] and not number.percent


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_other_text_is_no_number(text):
    assert parse_number(text) is None


def test_a_percentage_is_a_kind_of_its_own():
    percent = parse_number("70%")
    assert percent is not None and percent.percent and percent.value == 70
    assert parse_number("70 %") == parse_number("70.0%.") == percent
    assert percent != parse_number("70") and percent != parse_number("0.7")


def test_scientific_only_on_request_and_bounded():
    assert parse_number("1.5e3") is None
    assert parse_number("1.5e3", scientific=True) == parse_number("1500")
    assert parse_number("25E-1", scientific=True) == parse_number("2.5")
    assert parse_number("1e99", scientific=True).value == 10**99
    assert parse_number("1e100", scientific=True) is None
    assert parse_number("1e999999999", scientific=True) is None
    assert parse_number("1e-999999999", scientific=True) is None


@pytest.mark.parametrize(
    "huge",
    [
        "9" * 10**6,
        "-" * 10**6,
        "1," * 10**6,
        "1,234" * 10**5,
        "1/" * 10**6,
        "." * 10**6,
        " " * 10**6,
        "1e" + "9" * 10**6,
    ],
    ids=lambda text: text[:6],
)
def test_huge_text_is_no_number_and_costs_little(huge):
    start = time.perf_counter()
    assert parse_number(huge, scientific=True) is None
    assert last_number(huge) is None
    assert time.perf_counter() - start < 2.0  # a quadratic scan takes minutes


@pytest.mark.parametrize(
    "text, value",
    [
        ("so 3 + 4 = 7.", 7),
        ("7-3", 3),
        ("x=-3", -3),
        ("(1+2)-4", 4),
        ("5, 6, 7", 7),
        ("total: $1,234!", 1234),
        ("12,345.", 12345),
        ("a 3/4 cup", Fraction(3, 4)),
        ("it is \u22125 now", -5),
        ("step 1: x2 is 8 cm", 8),
        ("0.5", Fraction(1, 2)),
        ("= 12\n", 12),
    ],
)
def test_last_number_of_running_text(text, value):
    number = last_number(text)
    assert number is not None and number.value == value


@pytest.mark.parametrize("text", ["", "none", "1,23", "12/25/2020", "v1.2.3", "x2", "1e3", "007"])
def test_running_text_without_a_number(text):
    assert last_number(text) is None


SAME = [
    ("1,234", "1234"),
    ("1234", "1,234"),
    ("$5", "5"),
    ("5.00", "5"),
    ("+5", "5"),
    ("\u22125", "-5"),
    (" 5. ", "5"),
    ("6/8", "0.75"),
    ("70%", "70%"),
    ("70.0 %", "70%"),
    ("red  fox", " red fox "),
    ("0101", "0101"),
]
DIFFERENT = [
    ("5", "-5"),
    ("5", "50"),
    ("15", "5"),
    ("5 or 6", "5"),
    ("5 6", "56"),
    ("1.234", "1,234"),
    ("1,23", "123"),
    ("70%", "70"),
    ("70", "70%"),
    ("0.7", "70%"),
    ("five", "5"),
    ("101", "0101"),
    ("5.0000000001", "5"),
    ("0.333", "1/3"),
    ("", "0"),
    ("2+3", "5"),
    ("5e0", "5"),
    ("[5]", "5"),
    ("Red", "red"),
    ("red fox", "redfox"),
    ("redx", "red"),
    ("not red", "red"),
    ("9007199254740993", "9007199254740992"),
]


@pytest.mark.parametrize("got, want", SAME)
def test_same(got, want):
    assert same_answer(got, want)


@pytest.mark.parametrize("got, want", DIFFERENT)
def test_no_false_positive(got, want):
    assert not same_answer(got, want)


def test_case_is_ignored_on_request_only():
    assert same_answer("Red", "red", ignore_case=True) and not same_answer("Red", "red")


def test_every_integer_equals_its_own_spellings_and_no_other():
    rng = random.Random(0)
    for _ in range(500):
        a, b = rng.randint(-(10**6), 10**6), rng.randint(-(10**6), 10**6)
        for spelling in (f"{a}", f"{a:,}", f"{a}.0", f"{a}.", f" {a} ", f"{a:+}", f"{a:+,}.00", f"${a}", f"{2 * a}/2"):
            assert same_answer(spelling, str(a)), spelling
            assert same_answer(spelling, str(b)) == (a == b), spelling
