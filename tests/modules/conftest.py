"""A tiny policy, one optimizer step of data, and a Trainer that runs exactly that step."""

from contextlib import contextmanager
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_reason.checkpoint import SafeCheckpointIO
from lit_reason.loop.batching import collate, split
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.modules import PolicyModule, Teacher
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.types import Completion, Prompt

ALGORITHMS = Path(__file__).parents[2] / "conf" / "algorithm"


class Batches:
    """An iterable of given batches with a length."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Gradients(L.Callback):
    """The gradients and weights of each optimizer step, and the metrics logged after it."""

    def __init__(self):
        self.steps, self.metrics, self.bias = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.metrics):
            self.metrics.append({k: float(v) for k, v in trainer.logged_metrics.items()})
            self.bias.append([r.bias_E.clone() for r in pl_module.model.routers()])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, backward passes included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = (x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.fixture
def largest_tensor():
    """`with largest_tensor() as largest: ...; largest()`: elements of the largest tensor made within."""

    @contextmanager
    def watch():
        with LargestTensor() as mode:
            yield lambda: mode.elements

    return watch


@pytest.fixture
def make_model():
    def make(seed: int = 0, **changes) -> Transformer:
        torch.manual_seed(seed)
        shape = {
            "vocab_size": 40, "width": 32, "depth": 2, "heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 8, "ffn_width": 48, "experts": 4, "expert_width": 16,
            "max_seq_len": 48, "base": Base(width=32, depth=2),
        }  # fmt: skip
        return Transformer(ModelConfig(**shape | changes))

    return make


@pytest.fixture
def make_policy(make_model):
    """`make_policy("grpo", ...)`: the algorithm of that name in conf/."""

    def make(algorithm: str = "grpo", seed: int = 0, lr: float = 1e-3, **kwargs) -> PolicyModule:
        axes = yaml.safe_load((ALGORITHMS / f"{algorithm}.yaml").read_text())
        axes.pop("_target_")
        objective = Objective(**axes)
        if objective.needs_teacher:
            teacher = Teacher("another")
            teacher.load(lambda name: make_model(seed + 7))
            kwargs |= {"reference": teacher}
        return PolicyModule(make_model(seed), AdamW(lr=lr), objective, **kwargs)

    return make


@pytest.fixture
def round_batch():
    """16 rows of 4 groups with completions of 1..12 tokens, random advantages and all kinds of log-probs."""
    draw = torch.Generator().manual_seed(3)
    prompts = [Prompt(f"{b // 4:016x}", "", "", "", (b // 4 + 1,) * (2 + b // 4)) for b in range(16)]
    completions = []
    for prompt in prompts:
        n = int(torch.randint(1, 13, (), generator=draw))
        ids = tuple(torch.randint(0, 40, (n,), generator=draw).tolist())
        completions.append(Completion(prompt.id, 0, ids, (-3.5,) * n, "", "stop", 0, 0))
    batch = collate(prompts, completions, max_completion=12, pad_id=0)
    batch.mask_BT[5] = 0  # a row whose verifier failed
    shape = batch.mask_BT.shape
    batch.advantages_BT = torch.randn(16, 1, generator=draw).expand(shape).contiguous()
    batch.rollout_logprobs_BT = batch.rollout_logprobs_BT + 0.1 * torch.randn(shape, generator=draw)
    batch.values_BT, batch.returns_BT = (torch.randn(shape, generator=draw) for _ in range(2))
    batch.marked_BT = torch.rand(shape, generator=draw) < 0.2
    return batch


@pytest.fixture
def micro_batches(round_batch):
    """`micro_batches(policy, n)`: the step in n parts, with old and reference log-probs near the policy's own."""

    def cut(policy: PolicyModule, n: int):
        from lit_reason.modules import token_logprobs

        noise = torch.randn(round_batch.mask_BT.shape, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            own = token_logprobs(policy.model, round_batch, policy.temperature)[0]
        round_batch.old_logprobs_BT = (own + 0.4 * noise) * round_batch.mask_BT
        round_batch.ref_logprobs_BT = (own - 0.5 * noise.flip(0)) * round_batch.mask_BT
        return split(round_batch, range(16), torch.arange(4).repeat_interleave(4), n)

    return cut


@pytest.fixture
def fit(tmp_path):
    """`fit(module, batches, accumulate)` trains on them once; returns what was recorded."""

    def run(module, batches, accumulate: int = 1, ckpt_path=None, **kwargs):
        record = Gradients()
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            callbacks=[record],
            plugins=[SafeCheckpointIO()],
            accelerator="cpu",
            logger=False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            **kwargs,
        )
        trainer.fit(module, batches if hasattr(batches, "shape") else Batches(batches), ckpt_path=ckpt_path)
        record.trainer = trainer
        return record

    return run
