"""A loop on stub stages, and a real run: model, engine, objective, Trainer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml

from lit_reason.checkpoint import RNGState, SafeCheckpointIO
from lit_reason.data import ByteTokenizer, PromptCursor
from lit_reason.loop import RolloutLoop, RoundShape, Stages
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.modules import PolicyModule
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.rollout import BuiltinEngine, Sampling, request_seed
from lit_reason.types import Assessed, Completion, Prompt, RewardState, Scores

ALGORITHMS = Path(__file__).parents[2] / "conf" / "algorithm"


def prompts(n: int) -> list[Prompt]:
    """The first token of prompt i is i + 1, so that a row of a batch tells its group."""
    return [Prompt(f"{i:016x}", f"q{i}", "", "test", (i + 1, *range(50, 51 + i % 3))) for i in range(n)]


def scores(values: list[list[float]], wrong: set[int] = frozenset()) -> Scores:
    """Columns `a` and `b`; the verifier of `a` failed on the rows in `wrong`."""
    values_BR = torch.tensor(values)
    states_BR = torch.zeros(values_BR.shape, dtype=torch.int64)
    for b in wrong:
        values_BR[b, 0], states_BR[b, 0] = float("nan"), RewardState.ERROR
    return Scores(("a", "b"), torch.tensor([1.0, 0.5]), values_BR, states_BR, {(b, "a"): "broken" for b in wrong})


class StubStages:
    """Pure functions of the request seeds that write down when they are called."""

    def __init__(self, wrong: set[int] = frozenset(), logprob: float = -0.5) -> None:
        self.events, self.wrong, self.logprob = [], wrong, logprob

    def push(self, version):
        self.events.append(f"push {version}")

    def generate(self, prompts, seeds, samples):
        self.events.append("generate")
        return [
            Completion(p.id, i, tuple(s // 7**j % 90 for j in range(n)), (self.logprob,) * n, "", "stop", 0, s)
            for p, s, i in zip(prompts, seeds, samples, strict=True)
            if (n := 1 + s % 5)
        ]

    def score(self, prompts, completions):
        self.events.append("score")
        return scores([[c.seed % 11 / 10, c.seed % 3 / 2] for c in completions], self.wrong)

    def assess(self, rewards_BR, weights_R, group_B, mask_BT, valid_B, old_logprobs_BT, ref_logprobs_BT, **unused):
        self.events.append("assess")
        self.valid_B, self.group_B, self.old, self.ref = valid_B, group_B, old_logprobs_BT, ref_logprobs_BT
        return Assessed((rewards_BR.nan_to_num() @ weights_R)[:, None].expand(mask_BT.shape))

    def old_logprobs(self, batch):
        self.events.append("old")
        return batch.target_ids_BT / 100.0

    def stages(self, old: bool = True) -> Stages:
        return Stages(self.push, self.generate, self.score, self.assess, self.old_logprobs if old else None)


@pytest.fixture
def stub():
    return StubStages


@pytest.fixture
def make_loop():
    """`make_loop(stages, rounds=.., ...)`: 7 prompts, so that rounds cross the epochs of the data."""

    def make(stages: Stages, on_round=None, **shape) -> RolloutLoop:
        return RolloutLoop(
            PromptCursor(prompts(7), seed=5),
            stages,
            RoundShape(**shape),
            request_seed=request_seed,
            seed=1,
            max_completion=5,
            pad_id=99,
            on_round=on_round,
        )

    return make


class Even:
    """Two rewards that vary within groups: the share of even tokens, and the share below 128."""

    def __call__(self, prompts, completions):
        def share(c, keep):
            return sum(map(keep, c.token_ids)) / len(c.token_ids)

        return scores([[share(c, lambda t: t % 2 == 0), share(c, lambda t: t < 128)] for c in completions])


@pytest.fixture
def real_run(tmp_path):
    """`real_run(name, algorithm=.., shape=.., callbacks=.., max_steps=..)`: everything real but the reward."""

    def build(
        name: str, algorithm: str = "gdpo", shape=None, callbacks=(), max_steps=-1, lr=2**-6, on_push=None,
        reference=None, engine=None, **changes,
    ):  # fmt: skip
        shape = shape or RoundShape(rounds=3, prompts_per_round=3, group_size=4, micro_batches=2)
        torch.manual_seed(0)
        model = Transformer(
            ModelConfig(
                width=32, depth=2, heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
                ffn_width=48, experts=4, expert_width=16, max_seq_len=48, base=Base(width=32, depth=2),
            )
        )  # fmt: skip
        axes = yaml.safe_load((ALGORITHMS / f"{algorithm}.yaml").read_text())
        axes.pop("_target_")
        policy = PolicyModule(model, AdamW(lr=lr), Objective(**axes | changes), temperature=0.9, reference=reference)
        engine = BuiltinEngine(ByteTokenizer(), dtype="float32") if engine is None else engine
        sampling = Sampling(temperature=0.9, max_tokens=10)
        record = SimpleNamespace(policy=policy, engine=engine, completions=[], rewards=[], folder=tmp_path / name)

        def push(version):
            if on_push:
                on_push(policy.model)
            engine.push(policy.model, version)

        def freeze(version):
            if on_push:
                on_push(policy.model)
            return stages.freeze(version)

        def on_round(finished):
            record.completions.append([c for group in finished.groups for c in group.completions])
            record.rewards.append(torch.cat([group.scores.values_BR for group in finished.groups]))
            policy.on_round(finished)

        stages = policy.stages(engine, sampling, Even(), updates=shape.updates)
        watched = replace(stages, push=push, freeze=freeze)
        record.loop = RolloutLoop(
            PromptCursor(prompts(7), seed=5), watched, shape, request_seed=request_seed, seed=1, max_completion=10,
            pad_id=ByteTokenizer().pad_id, on_round=on_round,
        )  # fmt: skip
        record.trainer = L.Trainer(
            default_root_dir=record.folder,
            max_epochs=1,
            max_steps=max_steps,
            accumulate_grad_batches=shape.micro_batches,
            callbacks=[RNGState(), *callbacks],
            plugins=[SafeCheckpointIO()],
            accelerator="cpu",
            logger=False,
            log_every_n_steps=1,
            enable_checkpointing=any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        return record

    return build
