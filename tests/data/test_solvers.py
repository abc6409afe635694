"""Worked solutions agree with the datasets' answers, and every line of every thought is true arithmetic."""

import random
import re
from dataclasses import replace

import pytest

from lit_reason.data import JSONL, ReasoningGym, prompt_id, solve
from lit_reason.data.arithmetic import columns, plain, reduce_expression
from lit_reason.data.solvers import SOLVERS, STYLES
from lit_reason.errors import ConfigError, DataError
from lit_reason.types import Prompt

TASKS = {
    "chain_sum": {"allow_negation": True},
    "basic_arithmetic": {},
    "products": {"max_terms": 3, "max_digits": 3, "allow_negation": True},
    "gcd": {"max_numbers": 3},
    "lcm": {"max_numbers": 3},
    "countdown": {"max_numbers": 4},
}
LINE = re.compile(r"(-?\d+)([-+*/])(-?\d+)(?::(.*))?=(-?\d+)")


def true_line(line):
    """Is this line of thought correct? Judged with Python's own integers, not with the code under test."""
    if pair := re.fullmatch(r"(\d+) (\d+)", line):
        return int(pair[1]) >= int(pair[2]) or int(pair[2]) == 0
    if negated := re.fullmatch(r"-\((-?\d+)\)=(-?\d+)", line):
        return -int(negated[1]) == int(negated[2])
    if re.fullmatch(r"-?\d+", line):
        return True
    a, op, b, work, result = LINE.fullmatch(line).groups()
    a, b = int(a), int(b)
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else None}[op]
    return value == int(result) and all(true_column(step) for step in (work.split(",") if work else []))


def true_column(step):
    terms, result = step.split("=")
    return sum(int(t) for t in re.findall(r"[+-]?\d+", terms)) == int(result)


def euclid_holds(lines):
    """Consecutive pairs `a b`, `b a%b` until the second is 0."""
    pairs = [tuple(map(int, line.split())) for line in lines if re.fullmatch(r"\d+ \d+", line)]
    return all(b == 0 or pairs[i + 1] == (b, a % b) for i, (a, b) in enumerate(pairs))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_solutions_agree_with_500_entries(task):
    assert set(TASKS) == set(SOLVERS)
    size = 500 if task != "countdown" else 150  # the library makes these with sympy, 15 ms each
    prompts = list(ReasoningGym({task: TASKS[task]}, size=size, seed=11))
    assert len(prompts) == size
    for prompt in prompts:
        for style in STYLES:
            thought, answer = solve(prompt, style)
            lines = thought.split("\n")
            assert answer == prompt.answer and lines
            assert all(true_line(line) for line in lines), (prompt.question, thought)
            assert euclid_holds(lines), (prompt.question, thought)


@pytest.mark.parametrize("task", ["chain_sum", "basic_arithmetic", "products", "gcd", "lcm"])
def test_the_question_alone_is_enough(task):
    """Without reasoning-gym's metadata (say, from a JSONL under the same source name) the text is read."""
    for prompt in ReasoningGym({task: {}}, size=100, seed=3):
        assert solve(replace(prompt, meta={})) == solve(prompt)


def test_thoughts_read_as_documented():
    def one(task, question, answer, style="steps"):
        return solve(Prompt(prompt_id(question), question, answer, f"reasoning_gym/{task}"), style)

    assert one("chain_sum", "12 + 7 - 30 =", "-11") == ("12+7=19\n19-30=-11", "-11")
    assert one("chain_sum", "58 + 67 =", "125", "columns") == ("58+67:8+7=15,5+6+1=12=125", "125")
    assert one("products", "Solve: 205 * 38.", "7790") == ("205*8=1640\n205*30=6150\n1640+6150=7790", "7790")
    assert one("gcd", "of 69, 21.", "3") == ("69 21\n21 6\n6 3\n3 0", "3")
    assert one("lcm", "of 4, 6", "12") == ("6 4\n4 2\n2 0\n4/2=2\n2*6=12", "12")
    assert one("basic_arithmetic", "Calculate -( 2 - 5 ) * 4.", "12") == ("2-5=-3\n-(-3)=3\n3*4=12", "12")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", 14),
        ("2 - 3 - 4", -5),
        ("100 / 7 / 2", 7),
        ("-7 / 2", -4),  # rounds down, and the sign binds tighter
        ("-( 3 + 4 ) / 2", -4),
        ("2 * -( 1 - -( 4 ) )", -10),
        ("((5))", 5),
        ("- - 5", 5),
    ],
)
def test_precedence_and_signs(expression, value):
    assert reduce_expression(expression)[1] == value


def test_random_expressions_equal_pythons_own_value():
    rng = random.Random(0)

    def build(depth):
        if depth == 0 or rng.random() < 0.3:
            return str(rng.randint(-50, 50))
        text = f"{build(depth - 1)} {rng.choice('+-*')} {build(depth - 1)}"
        return rng.choice([text, f"({text})", f"-({text})"])

    for _ in range(300):
        text = build(4)
        lines, value = reduce_expression(text)
        assert value == eval(text) and all(true_line(line) for line in lines), text


def test_columns_for_every_sign_and_carry():
    rng = random.Random(1)
    for _ in range(500):
        a, b, op = rng.randint(-1200, 1200), rng.randint(-1200, 1200), rng.choice("+-")
        line = columns(a, op, b)
        assert line.startswith(f"{a}{op}{b}:") and true_line(line), line
        # the digits of the work, read from the left, are the result's
        steps = LINE.fullmatch(line)[4].split(",")
        ones = [step.split("=")[1] for step in steps]
        digits = ones[-1] + "".join(one[-1] for one in reversed(ones[:-1]))
        assert int(digits) == abs(a + b if op == "+" else a - b), line
    assert columns(6, "*", 7) == plain(6, "*", 7) == "6*7=42"


@pytest.mark.parametrize("text", ["2 +", "(2", "2)", "2 3", "import os", "2 ** 3", "", "x + 1", "1.5 + 2"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(DataError, match="cannot read"):
        reduce_expression(text)


def test_division_by_zero_and_remainders():
    with pytest.raises(DataError, match="division by zero in 3/0"):
        reduce_expression("3 / (1 - 1)")
    assert reduce_expression("7 / 2")[1] == 3
    with pytest.raises(DataError, match=r"7/2 .* no whole number"):
        reduce_expression("7 / 2", exact=True)


def test_a_wrong_reference_is_not_taught():
    prompt = Prompt("0" * 16, "2 + 2 =", "5", "reasoning_gym/chain_sum")
    with pytest.raises(DataError, match="ends in 4, but reasoning_gym/chain_sum says 5"):
        solve(prompt)


def test_own_thoughts_come_first_and_unknown_tasks_have_none(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "how many?", "answer": "3", "thought": "I count 3."}')
    assert solve(next(iter(JSONL(str(path))))) == ("I count 3.", "3")
    assert solve(Prompt("0" * 16, "how many?", "3", "jsonl/mine")) is None
    with pytest.raises(ConfigError, match="did you mean 'columns'"):
        solve(Prompt("0" * 16, "1 + 1", "2", "reasoning_gym/chain_sum"), style="column")
