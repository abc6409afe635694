"""Rounds that were generated and not yet trained, as tensors and primitives for a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lit_reason.loop.collect import Rollout
from lit_reason.types import Completion, Prompt, RolloutGroup, Scores

_LISTS = {"token_ids": torch.int64, "logprobs": torch.float64, "mask": torch.int8}  # one tensor for all completions


def pack_rollout(rollout: Rollout) -> dict[str, Any]:
    """Everything that `unpack_rollout` needs to make an equal one."""
    position = {id(group): i for i, group in enumerate(rollout.generated)}
    return {
        "index": rollout.index,
        "groups": [position[id(group)] for group in rollout.groups],
        "silent": rollout.silent,
        "seconds": dict(rollout.seconds),
        "prompts": [_plain(g.prompt, token_ids=list, meta=_json) for g in rollout.generated],
        "scores": [_plain(g.scores, messages=dict) for g in rollout.generated],
        "greedy": [None if g.greedy is None else _plain(g.greedy, messages=dict) for g in rollout.generated],
        "sizes": [len(g.completions) for g in rollout.generated],
        "completions": _pack_completions([c for g in rollout.generated for c in g.completions]),
    }


def unpack_rollout(state: dict[str, Any]) -> Rollout:
    completions = iter(_unpack_completions(state["completions"]))
    generated = []
    parts = (state[name] for name in ("prompts", "scores", "greedy", "sizes"))
    for prompt, scores, greedy, size in zip(*parts, strict=True):
        prompt = prompt | {"token_ids": tuple(prompt["token_ids"]), "meta": json.loads(prompt["meta"])}
        group = [next(completions) for _ in range(size)]
        generated.append(
            RolloutGroup(Prompt(**prompt), group, Scores(**scores), None if greedy is None else Scores(**greedy))
        )
    groups = [generated[i] for i in state["groups"]]
    return Rollout(state["index"], groups, state["silent"], generated, dict(state["seconds"]))


def _plain(record: Any, **how: Any) -> dict[str, Any]:
    """A dataclass's fields, some of them converted."""
    keep = {f.name: getattr(record, f.name) for f in fields(record)}
    return keep | {name: convert(keep[name]) for name, convert in how.items()}


def _json(meta: Any) -> str:
    return json.dumps(dict(meta))


def _pack_completions(completions: Sequence[Completion]) -> dict[str, Any]:
    """One list per field; the long ones as a tensor of all rows."""
    packed: dict[str, Any] = {f.name: [getattr(c, f.name) for c in completions] for f in fields(Completion)}
    return packed | {name: _ragged(packed[name], dtype) for name, dtype in _LISTS.items()}


def _unpack_completions(packed: dict[str, Any]) -> list[Completion]:
    columns = packed | {name: _rows(*packed[name]) for name in _LISTS}
    return [Completion(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _ragged(rows: Sequence[Sequence[float] | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All rows in one tensor, and their lengths; -1 for a row that is None."""
    lengths = torch.tensor([-1 if row is None else len(row) for row in rows])
    return torch.tensor([x for row in rows for x in row or ()], dtype=dtype), lengths


def _rows(values: Tensor, lengths: Tensor) -> list[tuple[Any, ...] | None]:
    parts = values.split(lengths.clamp_min(0).tolist())
    return [None if n < 0 else tuple(part.tolist()) for n, part in zip(lengths.tolist(), parts, strict=True)]
