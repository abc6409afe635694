import pytest

from lit_reason.errors import ConfigError
from lit_reason.rewards import FormatApprox, FormatExact

GOOD = "<think>1+4=5</think><answer>5</answer>"


@pytest.mark.parametrize(
    "text, exact, approx",
    [
        (GOOD, 1, 1.0),
        ("<think></think><answer></answer>", 1, 1.0),
        (GOOD + " ", 0, 1.0),
        ("So: " + GOOD, 0, 1.0),
        ("<think>a</think>\n<answer>5</answer>", 0, 1.0),
        (GOOD + "<answer>6</answer>", 0, 0.4),  # only the two think tags occur once
        ("<think>a<think></think><answer>5</answer>", 0, 0.6),
        ("<answer>5</answer><think>a</think>", 0, 0.8),  # all once, wrong order
        ("<think>a</think><answer>5", 0, 0.6),
        ("<answer>5</answer>", 0, 0.4),
        ("<think>", 0, 0.2),
        ("5", 0, 0.0),
        ("", 0, 0.0),
        ("<THINK>a</THINK><ANSWER>5</ANSWER>", 0, 0.0),
    ],
)
def test_format_table(make, text, exact, approx):
    prompt, completion = make(text)
    assert FormatExact().score(prompt, completion) == exact
    assert FormatApprox().score(prompt, completion) == approx


def test_exact_needs_the_stop_token(make):
    assert FormatExact()(*([x] for x in make(GOOD, finish_reason="length"))) == [0.0]
    assert FormatExact()(*([x] for x in make(GOOD))) == [1.0]


def test_whitespace_between_blocks_on_request(make):
    loose = FormatExact(whitespace=True)
    assert loose.score(*make("\n<think>a</think>\n\n<answer>5</answer>\n")) == 1
    assert loose.score(*make("<think>a</think> so <answer>5</answer>")) == 0


def test_own_tags(make):
    reward = FormatExact(think_open="[T]", think_close="[/T]", answer_open="[A]", answer_close="[/A]")
    assert reward.score(*make("[T]a[/T][A]5[/A]")) == 1 and reward.score(*make(GOOD)) == 0


def test_equal_tags_are_refused():
    with pytest.raises(ConfigError, match="four different"):
        FormatExact(think_open="<answer>")
