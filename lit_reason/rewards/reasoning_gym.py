"""A reasoning-gym task's own score. Several of its scorers evaluate the answer, so they run in the sandbox only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_reason.rewards.base import RewardFault, Tags
from lit_reason.sandbox import Sandbox, Verdict
from lit_reason.types import Completion, Prompt, RewardState


class ReasoningGymScore:
    """`score_answer` of the prompt's task, in a killable child process; usually in [0, 1].

    The text inside the one pair of answer tags is scored, stripped; without such a pair the score is 0 and the task is
    not asked (some give 0.01 for nothing). `prompt.meta["reasoning_gym"]` holds `{"dataset": "countdown", "entry":
    {"question", "answer", "metadata"}}` and, where the scorer depends on it, `"config"`.

    Args:
        timeout_s: seconds for one answer; beyond them its state is TIMEOUT.
        workers: processes that score side by side.
        memory_mb: address space of one child.
        isolation: `"auto"` (bubblewrap where it works), `"bwrap"` (refuse without it) or `"limits"`.
        answer_open, answer_close: the tags.
        weight: the column's weight.
    """

    def __init__(
        self,
        timeout_s: float = 2.0,
        workers: int = 1,
        memory_mb: int = 1024,
        isolation: str = "auto",
        answer_open: str = "<answer>",
        answer_close: str = "</answer>",
        weight: float = 1.0,
    ) -> None:
        self.weight = float(weight)
        self.tags = Tags(answer_open=answer_open, answer_close=answer_close)
        self.sandbox = Sandbox(timeout_s=timeout_s, workers=workers, memory_mb=memory_mb, isolation=isolation)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | RewardFault]:
        results: list[float | RewardFault] = [0.0] * len(prompts)
        payloads: dict[int, dict[str, Any]] = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            answer = self.tags.answer(completion.text)
            task = prompt.meta.get("reasoning_gym")
            if task is None:
                message = f"prompt {prompt.id} of {prompt.source} has no meta['reasoning_gym']"
                results[row] = RewardFault(RewardState.ERROR, message)
            elif answer is not None:
                payloads[row] = {**task, "answer": answer.strip()}
        verdicts = self.sandbox.score(list(payloads.values()))
        for row, verdict in zip(payloads, verdicts, strict=True):
            results[row] = _entry(verdict)
        return results

    def close(self) -> None:
        """End the worker processes (they also end with this process)."""
        self.sandbox.close()


def _entry(verdict: Verdict) -> float | RewardFault:
    return verdict.value if verdict.state is RewardState.OK else RewardFault(verdict.state, verdict.message)
