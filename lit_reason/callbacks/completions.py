"""Every completion of every round, kept as JSON lines."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_reason.checkpoint.atomic import recording
from lit_reason.errors import RolloutError
from lit_reason.loop.metrics import token_ages
from lit_reason.report.records import set_aside, write_rows
from lit_reason.types import RewardState, RolloutGroup

log = logging.getLogger(__name__)


class CompletionsTable(Callback):
    """Writes one file per round, `completions/step-00000012.jsonl`, one line per completion.

    A line holds step, prompt_id, sample_idx, source, question, answer, text, rewards (`{name: value}`, null where a
    verifier failed), faults, total, advantage, version (of the policy that began it), age (rounds between the weights
    that wrote its tokens and those that it trains, on average; null from a module without a `policy_version`),
    finish_reason, tokens, seed. Read it with `pandas.read_json(path, lines=True)` or `jq`.

    A file is written whole or not at all. A resumed run drops the files of the steps it will do again; a run that
    starts at step 0 beside older files renames their folder to `completions.old-1`. With several ranks each writes its
    own file (`step-00000012.rank1.jsonl`).

    Whoever generates announces a round by calling `on_rollout` on every callback that has it; `PolicyModule` does.

    Args:
        dirpath: folder of the files; None: `completions` under the trainer's `default_root_dir`.

    Example::

        Trainer(callbacks=[CompletionsTable()])

    YAML::

        completions:
          _target_: lit_reason.callbacks.CompletionsTable
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._step = -1
        self._rows: list[dict[str, Any]] = []

    def folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath) if self.dirpath else Path(trainer.default_root_dir) / "completions"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._rows = -1, []
        if trainer.is_global_zero:
            self._drop_from(self.folder(trainer), trainer.global_step)
        trainer.strategy.barrier("lit_reason.CompletionsTable")

    def on_rollout(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        groups: Sequence[RolloutGroup],
        advantages_B: Tensor,
        step: int,
    ) -> None:
        """One round: its groups, and the advantages of their completions in the same order."""
        rows = table_rows(groups, advantages_B, step, getattr(pl_module, "policy_version", None))
        # a second round within one optimizer step joins the first
        self._rows = self._rows + rows if step == self._step else rows
        self._step = step
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.folder(trainer) / f"step-{step:08d}{rank}.jsonl"
        with recording(path):
            write_rows(path, self._rows)

    @staticmethod
    def _drop_from(folder: Path, step: int) -> None:
        if step == 0:
            if old := set_aside(folder):
                log.warning("this run starts at step 0: the completions of a former run were moved to %s", old)
            return
        for path in folder.glob("step-*.jsonl"):
            mine = re.fullmatch(r"step-(\d+)(\.rank\d+)?\.jsonl", path.name)
            if mine and int(mine[1]) >= step:
                path.unlink()


def table_rows(
    groups: Sequence[RolloutGroup], advantages_B: Tensor, step: int, version: int | None = None
) -> list[dict[str, Any]]:
    """The lines of one round, which trains the weights of `version`."""
    count = sum(len(group.completions) for group in groups)
    if len(advantages_B) != count:
        raise RolloutError(f"on_rollout got {len(advantages_B)} advantages for {count} completions; pass one per row")
    advantages, rows = iter(advantages_B.tolist()), []
    for group in groups:
        scores = group.scores
        ok_BR = (scores.states_BR == RewardState.OK).tolist()
        columns = zip(scores.values_BR.tolist(), scores.total_B.tolist(), ok_BR, group.completions, strict=True)
        for row, (values, total, ok, completion) in enumerate(columns):
            judged = list(zip(scores.names, values, ok, strict=True))
            rows.append(
                {
                    "step": step,
                    "prompt_id": group.prompt.id,
                    "sample_idx": completion.sample_idx,
                    "source": group.prompt.source,
                    "question": group.prompt.question,
                    "answer": group.prompt.answer,
                    "text": completion.text,
                    "rewards": {name: value if fine else None for name, value, fine in judged},
                    "faults": {name: scores.messages.get((row, name), "") for name, _, fine in judged if not fine},
                    "total": total if all(ok) else None,
                    "advantage": next(advantages),
                    "version": completion.version,
                    "age": None if version is None else token_ages(completion, version).mean().item(),
                    "finish_reason": completion.finish_reason,
                    "tokens": len(completion.token_ids),
                    "seed": completion.seed,
                }
            )
    return rows
