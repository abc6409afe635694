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
# JSON has no tuples, and these tasks compare a grid of tuples with the entry's: lists would never be equal.
_COMPARES_TUPLES = frozenset(["arc_agi", "rearc"])
# Tasks of reasoning-gym 0.1.25 that raise these for an answer of the wrong form, where the others give 0.
_RAISES_ON_MALFORMED: dict[str, tuple[type[Exception], ...]] = {
    "boxnet": (AttributeError, TypeError),
    "game_of_life": (KeyError,),
    "prime_factorization": (ValueError,),
}
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
    answer = str(payload["answer"])
    return ":=" not in answer and _CALL.search(answer) is None


def prepare(payload: dict) -> None:
    """Build the task once, before the fork, and let it score the reference answer so that late imports are done."""
    if is_prepared(payload):
        return
    key = _key(payload)
    _DATASETS[key] = reasoning_gym.create_dataset(payload["dataset"], **(payload.get("config") or {}))
    with contextlib.suppress(Exception):  # a warm-up; what fails here fails again, and visibly, in the child
        score({**payload, "answer": payload["entry"]["answer"]})


def score(payload: dict) -> float:
    """The task's own score of the answer, usually in [0, 1]."""
    name, entry = payload["dataset"], payload["entry"]
    entry = {**entry, "metadata": _tuples(entry["metadata"])} if name in _COMPARES_TUPLES else entry
    try:
        return float(_DATASETS[_key(payload)].score_answer(payload["answer"], entry))
    except _RAISES_ON_MALFORMED.get(name, ()):
        return 0.0


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
