"""A real RL run, whose pushes and generations can be done in another way: Trainer, objective, rewards, vLLM, proof."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from faults.hosts import FaultyEngine
from lit_reason import zoo
from lit_reason.data import PromptCursor, PromptData, ReasoningGym
from lit_reason.loop import RolloutLoop, RoundShape
from lit_reason.models.lora import LoRA
from lit_reason.modules import PolicyModule
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.optim.recipe import OptimizerRecipe
from lit_reason.rewards import AnswerExact, FormatExact, Rubric
from lit_reason.rollout import Sampling, request_seed
from lit_reason.rollout.engine import OnProgress
from lit_reason.sync import Proof, ProvenEngine
from lit_reason.types import Completion, Prompt

START = "arith-1m.sft"
ALGORITHM = Path(__file__).resolve().parents[2] / "conf" / "algorithm" / "gdpo.yaml"
TASKS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}}
SAMPLING = Sampling(temperature=1.0, max_tokens=48)
DEADLINES = {"generate": 5.0, "push": 60.0}


class Still:
    """A recipe that changes nothing, at lr = 0."""

    def build(self, model: nn.Module, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return optimizer, LambdaLR(optimizer, lambda step: 1.0)


@dataclass
class Run:
    """What a fault can reach. `push` and `ask` are those of the run's own stages for the round it is in."""

    engine: FaultyEngine
    proven: ProvenEngine
    policy: PolicyModule
    version: int = 0
    push: Callable[[], None] = lambda: None
    ask: Callable[[OnProgress | None], list[Completion]] = lambda progress: []
    prompts: list[Prompt] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        return self.policy.model

    def heal(self) -> None:
        """A healthy engine with this round's weights."""
        self.engine.fault_at_start = ""
        if self.engine._process is not None and self.engine._process.alive:
            self.engine.wake()
            self.engine.inject("")
        else:
            self.engine.fault = ""
        self.push()


class Watch(L.Callback):
    """Keeps each step's mismatch."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.run.kl.append(float(trainer.callback_metrics["mismatch/kl"]))


def start(dtype: str) -> tuple[PromptData, nn.Module, ProvenEngine, FaultyEngine]:
    """Data, model and a proven engine that has not started yet."""
    loaded = zoo.load(START)
    data = PromptData(ReasoningGym(TASKS, size=2000), tokenizer=loaded.tokenizer, max_prompt_tokens=96)
    engine = FaultyEngine(loaded.tokenizer, dtype=dtype, deadlines=DEADLINES, max_rows=64)
    texts = [prompt.token_ids for prompt in data.train_prompts()[:64]]
    proof = Proof(texts)
    return data, loaded.model.float(), ProvenEngine(engine, proof), engine


def play(
    data: PromptData,
    model: nn.Module,
    proven: ProvenEngine,
    engine: FaultyEngine,
    rounds: int,
    before_push: Callable[[Run], None] = lambda run: None,
    before_training: Callable[[Run], None] = lambda run: None,
    lora: bool = False,
    lr: float = 5e-5,
) -> Run:
    """`rounds` optimizer steps of GDPO. `before_push` and `before_training` may break what they mend."""
    model = copy.deepcopy(model)
    if lora:
        LoRA(rank=4).apply(model)
    torch.manual_seed(0)
    axes = {key: value for key, value in yaml.safe_load(ALGORITHM.read_text()).items() if key != "_target_"}
    recipe: OptimizerRecipe = AdamW(lr=lr) if lr else Still()
    bias_rate = 1e-3 if lr and not lora else 0.0  # moves the routers' biases, which a push must not forget
    policy = PolicyModule(
        model, recipe, Objective(**axes), temperature=SAMPLING.temperature, router_bias_rate=bias_rate
    )
    rubric = Rubric({"answer": AnswerExact(), "format": FormatExact(weight=0.5)})
    stages = policy.stages(proven, SAMPLING, rubric.judge, updates=2, check=rubric.check)  # with mismatch/kl
    run = Run(engine, proven, policy)

    def push(version: int) -> None:
        run.version, run.push = version, lambda: proven.push(policy.model, version)
        before_push(run)
        stages.push(version)
        run.gaps.append(proven.measured["sync/gap"])

    def generate(prompts: Sequence[Prompt], seeds: Sequence[int], samples: Sequence[int]) -> list[Completion]:
        def ask(progress: OnProgress | None) -> list[Completion]:
            return proven.generate(prompts, SAMPLING, seeds, samples, progress)

        run.ask, run.prompts = ask, list(prompts)
        found = stages.generate(prompts, seeds, samples)
        before_training(run)
        return found

    shape = RoundShape(rounds=rounds, prompts_per_round=4, group_size=4)
    loop = RolloutLoop(
        PromptCursor(data.train_prompts(), seed=1),
        replace(stages, push=push, generate=generate),
        shape,
        request_seed=request_seed,
        seed=1,
        max_completion=SAMPLING.max_tokens,
        pad_id=data.tokenizer.pad_id,
        on_round=policy.on_round,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=[Watch(run)],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(policy, loop, weights_only=True)
    return run


def seconds_of(act: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = act()
    return time.perf_counter() - began, found
