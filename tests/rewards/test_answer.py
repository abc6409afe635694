import pytest

from lit_reason.rewards import AnswerAnywhere, AnswerExact, RewardFault
from lit_reason.types import RewardState


@pytest.mark.parametrize(
    "text, answer, strict, blind",
    [
        ("<think>t</think><answer>5</answer>", "5", 1, 1),
        ("<think>t</think><answer>$1,234.00</answer>", "1234", 1, 1),
        ("<think>t</think><answer>70%</answer>", "70%", 1, 1),
        ("<think>t</think><answer>70%</answer>", "70", 0, 0),
        ("<answer>6</answer>", "5", 0, 0),
        ("<answer>6</answer> no, 5", "5", 0, 0),  # tags are there, so they are what counts
        ("<answer>5</answer> no, 6", "5", 1, 1),
        ("<answer>4</answer><answer>5</answer>", "5", 0, 1),  # two guesses
        ("<answer>5</answer><answer>4</answer>", "5", 0, 0),
        ("<answer>5 apples</answer>", "5", 0, 1),
        ("<answer>5", "5", 0, 1),
        ("5</answer>", "5", 0, 1),
        ("</answer>5<answer>", "5", 0, 1),
        ("so 2 + 3 = 5.", "5", 0, 1),
        ("5 is less than 6", "5", 0, 0),
        ("-5", "5", 0, 0),
        ("15", "5", 0, 0),
        ("", "5", 0, 0),
        ("<answer></answer>", "5", 0, 0),
        ("<answer> red  fox </answer>", "red fox", 1, 1),
        ("I think:\nred fox\n", "red fox", 0, 1),
        ("not a red fox", "red fox", 0, 0),
        ("<answer>not a red fox</answer>", "red fox", 0, 0),
        ("<answer>2+3</answer>", "5", 0, 0),  # parsed, never evaluated
    ],
)
def test_answer_table(make, text, answer, strict, blind):
    prompt, completion = make(text, answer)
    assert AnswerExact().score(prompt, completion) == strict
    assert AnswerAnywhere().score(prompt, completion) == blind


@pytest.mark.parametrize("reward", [AnswerExact(), AnswerAnywhere()])
def test_no_reference_is_a_fault_not_a_zero(make, reward):
    (entry,) = reward(*([x] for x in make("<answer></answer>", answer=" ")))
    assert isinstance(entry, RewardFault) and entry.state is RewardState.ERROR and "no reference" in entry.message


def test_case_and_own_tags(make):
    assert AnswerExact(ignore_case=True).score(*make("<answer>RED</answer>", "red")) == 1
    assert AnswerExact(answer_open="[A]", answer_close="[/A]").score(*make("[A]5[/A]", "5")) == 1
