import pytest

from lit_reason.types import Completion, Prompt


@pytest.fixture
def make():
    """make(text, answer) -> (prompt, completion), both with id "p"."""

    def build(text="", answer="5", finish_reason="stop", tokens=1, meta=None):
        prompt = Prompt("p", "how many?", answer, "test", meta=meta or {})
        zeros = (0.0,) * tokens
        return prompt, Completion("p", 0, tuple(range(tokens)), zeros, text, finish_reason, 0, 0)

    return build
