"""Scores an answer with its own reasoning-gym task. Only the worker loads this: several tasks evaluate the answer.

payload: `{"dataset": "gcd", "config": {}, "entry": {"question": ..., "answer": ..., "metadata": ...}, "answer": "12"}`
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import reasoning_gym

_DATASETS: dict[str, Any] = {}
_CALL = re.compile(r"[^-+*/%,=<>(\[{ \t][ \t]*\(")


def _key(payload: dict) -> str:
    return json.dumps([payload["dataset"], payload.get("config") or {}], sort_keys=True)


def is_prepared(payload: dict) -> bool:
    """Whether this payload's task is built."""
    return _key(payload) in _DATASETS


def shareable(payload: dict) -> bool:
    """Whether the answer cannot change the process even if evaluated: a Python expression without a call (every "("
    follows an operator, a comma or an opening bracket) and without ":=" has no side effect; it can only fail or hang.

    Example::

        >>> [shareable({"answer": a}) for a in ("(94 - 61)*4", "9**9**9", "exit()", "[np:=0 for _ in [1]]")]
        [True, True, False, False]
    """
    answer = payload["answer"]
    return ":=" not in answer and _CALL.search(answer) is None


def prepare(payload: dict) -> None:
    """Build the task once, before the fork, and let it score the reference answer so that late imports are done."""
    if is_prepared(payload):
        return
    key = _key(payload)
    _DATASETS[key] = reasoning_gym.create_dataset(payload["dataset"], **(payload.get("config") or {}))
    with contextlib.suppress(Exception):  # a warm-up; what fails here fails again, and visibly, in the child
        _DATASETS[key].score_answer(payload["entry"]["answer"], payload["entry"])


def score(payload: dict) -> float:
    """The task's own score of the answer, usually in [0, 1]."""
    return float(_DATASETS[_key(payload)].score_answer(payload["answer"], payload["entry"]))
