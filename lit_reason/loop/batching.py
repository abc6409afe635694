"""From a scored round to micro-batches. Pure functions on records and tensors.

Shapes: B sequences of a round, T tokens (padded prompt + completion - 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_reason.errors import RolloutError
from lit_reason.types import Completion, PolicyBatch, Prompt


def collate(
    prompts: Sequence[Prompt], completions: Sequence[Completion], max_completion: int, pad_id: int
) -> PolicyBatch:
    """One padded batch of B sequences, with advantages still 0 and totals of this batch alone."""
    B = len(prompts)
    lengths = [len(p.token_ids) + len(c.token_ids) for p, c in zip(prompts, completions, strict=True)]
    ids = torch.full((B, max(lengths)), pad_id, dtype=torch.int64)
    mask = torch.zeros(B, max(lengths))
    rollout = torch.zeros(B, max(lengths))
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = len(prompt.token_ids)
        ids[b, : lengths[b]] = torch.tensor(prompt.token_ids + completion.token_ids)
        mask[b, start : lengths[b]] = 1.0 if completion.mask is None else torch.tensor(completion.mask).float()
        rollout[b, start : lengths[b]] = torch.tensor(completion.logprobs)
    return PolicyBatch(
        input_ids_BT=ids[:, :-1],
        target_ids_BT=ids[:, 1:],
        mask_BT=mask[:, 1:],
        advantages_BT=torch.zeros(B, max(lengths) - 1),
        rollout_logprobs_BT=rollout[:, 1:],
        group_tokens_B=torch.ones(B),
        sequences_total=torch.tensor(float(B)),
        tokens_total=mask.sum(),
        prompts_total=torch.tensor(float(len({p.id for p in prompts}))),
        max_completion=torch.tensor(float(max_completion)),
        experts_BTLK=_experts(prompts, completions, max(lengths) - 1),
    )


def _experts(prompts: Sequence[Prompt], completions: Sequence[Completion], T: int) -> Tensor | None:
    """experts_BTLK, int16: -1 where no engine told them; None when it told none at all.

    Raises:
        RolloutError: not one row per token that the engine read, or an expert twice for one token.
    """
    told = [completion.experts_SLK for completion in completions if completion.experts_SLK is not None]
    if not told:
        return None
    LK = told[0].shape[1:]
    experts_BTLK = torch.full((len(completions), T, *LK), -1, dtype=torch.int16)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if (experts_SLK := completion.experts_SLK) is None:
            continue
        S = len(prompt.token_ids) + len(completion.token_ids) - 1
        if experts_SLK.shape != (S, *LK):
            raise RolloutError(
                f"the engine's experts for prompt {prompt.id}, sample {completion.sample_idx}, have shape "
                f"{tuple(experts_SLK.shape)}; expected {(S, *LK)}: a row per token that it read, the last left out"
            )
        ordered = experts_SLK.sort(-1).values
        if ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any():
            raise RolloutError(
                f"the engine's experts for prompt {prompt.id}, sample {completion.sample_idx}, name one twice for a "
                "token: a buffer that was never filled? Where the engine does not know, it must say -1"
            )
        experts_BTLK[b, :S] = experts_SLK
    return experts_BTLK


def minibatches(groups: int, group_size: int, count: int, seed: int) -> list[list[int]]:
    """Deals whole groups, shuffled by `seed`, into `count` optimizer steps; returns each step's sequence indices."""
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed)).tolist()
    size = groups // count
    return [
        [g * group_size + i for g in order[start : start + size] for i in range(group_size)]
        for start in range(0, groups, size)
    ]


def split(batch: PolicyBatch, rows: Sequence[int], group_B: Tensor, micro_batches: int) -> list[PolicyBatch]:
    """The `rows` of one optimizer step as `micro_batches` batches of equal size. Groups stay together as far as that
    size allows, because their prompt is computed once per micro-batch; groups of similar length are neighbours.

    Every micro-batch carries the step's totals, so the loss shares add up to the loss of the whole step.
    """
    step = take(batch, torch.tensor(rows))
    group = group_B[torch.tensor(rows)]
    groups = int(group_B.max()) + 1
    counted = step.mask_BT.sum(1) > 0
    tokens_by_group = torch.zeros(groups).index_add(0, group, step.mask_BT.sum(1))
    step.group_tokens_B = tokens_by_group[group]
    step.sequences_total = counted.sum().float()
    step.tokens_total = step.mask_BT.sum()
    step.prompts_total = torch.tensor(float(group[counted].unique().numel()))
    longest = torch.zeros(groups, dtype=torch.int64).scatter_reduce(0, group, _used_length(step), "amax")
    order = (longest[group] * groups + group).argsort(stable=True)
    return [_trim(take(step, part)) for part in order.chunk(micro_batches)]


def take(batch: PolicyBatch, index_B: Tensor) -> PolicyBatch:
    """The rows `index_B`; totals are kept as they are."""
    values = {name: getattr(batch, name) for name in PolicyBatch.__dataclass_fields__}
    return PolicyBatch(**{k: v[index_B] if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()})


def _used_length(batch: PolicyBatch) -> Tensor:
    """(B,) positions up to the last token that counts."""
    return (batch.mask_BT * torch.arange(1, batch.mask_BT.shape[1] + 1)).amax(1).long()


def _trim(batch: PolicyBatch) -> PolicyBatch:
    """Cuts the padding that no row of this micro-batch needs."""
    used = max(int(_used_length(batch).max()), 1)
    for name in PolicyBatch.__dataclass_fields__:
        value = getattr(batch, name)
        if isinstance(value, Tensor) and value.dim() > 1:
            setattr(batch, name, value[:, :used].contiguous())
    return batch
