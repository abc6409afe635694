import pytest

from lit_reason.environments import Calculator, Environment, ToolFault, Tools, Turn
from lit_reason.errors import ConfigError


def ask(tools, *texts):
    return tools.step([None] * len(texts), [Turn(text, "stop") for text in texts])


def test_the_first_complete_call_of_each_turn_is_answered():
    tools = Tools({"calc": Calculator(), "up": lambda requests: [r.upper() for r in requests]})
    assert isinstance(tools, Environment)
    texts = [
        "<calc>1+1</calc>",
        "nothing",
        "<up> a\nb </up><calc>2</calc>",
        "<calc>3",
        "<calc><up>x</up></calc>",
        "<calc>4</up>",
    ]
    assert [step.observation for step in ask(tools, *texts)] == [
        "2",
        None,
        "A\nB",
        None,
        "error: cannot read '<up>x</up>'",
        None,
    ]
    assert [tools.asks(text) for text in texts] == [True, False, True, False, True, False]


def test_all_calls_of_a_turn_come_to_a_tool_at_once():
    asked = []

    def tool(requests):
        asked.append(list(requests))
        return [f"<{request}>" for request in requests]

    steps = ask(Tools({"a": tool, "b": tool}), "<a>1</a>", "<b>2</b>", "", "<a>3</a>")
    assert asked == [["1", "3"], ["2"]] and [s.observation for s in steps] == ["<1>", "<2>", None, "<3>"]


def test_a_fault_of_the_tool_is_a_fault_of_the_row_and_a_long_answer_is_marked():
    tools = Tools({"a": lambda requests: [ToolFault("broken") if r == "x" else r * 9 for r in requests]}, max_chars=4)
    bad, cut, whole = ask(tools, "<a>x</a>", "<a>yy</a>", "<a></a>")
    assert (
        (bad.observation, bad.fault) == (None, "broken") and cut.observation == "yyyy [cut]" and whole.observation == ""
    )


def test_a_tool_that_raises_or_loses_count_is_a_fault_of_its_rows_alone():
    def raises(requests):
        raise KeyError("x")

    tools = Tools({"a": raises, "b": lambda requests: requests[1:], "c": lambda requests: requests})
    steps = ask(tools, "<a>1</a>", "<b>1</b>", "<b>2</b>", "<c>3</c>")
    assert [step.fault for step in steps] == ["a: KeyError: 'x'", *["b: 1 answers to 2 requests"] * 2, ""]

    def refuses(requests):
        raise ConfigError("type something")

    with pytest.raises(ConfigError, match="type something"):
        ask(Tools({"a": refuses}), "<a>1</a>")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tools": {}}, "environment=calculator"),
        ({"tools": {"answer": Calculator()}}, "environment.tools.answer.*and none of answer, result, think"),
        ({"tools": {"A b": Calculator()}}, "small letters"),
        ({"tools": {"a": Calculator()}, "max_turns": 0}, "environment.max_turns=0"),
    ],
)
def test_settings_without_sense_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        Tools(**kwargs)
