"""An optimizer step of every shipped algorithm through a small real model; as a script, its gradients on gloo ranks.

    python tests/objectives/invariance.py OUT.pt        # gradients of all algorithms on 1, 2 and 4 processes

A process of its own, because ranks are forked before anything of torch runs.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_reason.loop.batching import collate, split
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.modules import PolicyModule, Teacher
from lit_reason.modules.logprobs import token_logprobs
from lit_reason.optim import AdamW
from lit_reason.types import Completion, Prompt

ALGORITHMS = sorted((Path(__file__).resolve().parents[2] / "conf" / "algorithm").glob("*.yaml"))
P, G, B = 4, 6, 24
WORLDS = (1, 2, 4)
# Beside the files as they are: what they switch off.
EXTRA = {
    "grpo with all": {
        "entropy_coef": 0.05,
        "correction": {"name": "mask", "level": "token", "low": 0.5, "high": 2.0},
        "kl": {"name": "k3_is_corrected", "weight": 0.1},
    },
    "dapo per prompt": {"aggregation": "prompt_mean_token_mean"},
}
NAMES = [path.stem for path in ALGORITHMS] + list(EXTRA)


def load(name):
    """The objective of a YAML, or of `EXTRA`, whose first word is one."""
    config = OmegaConf.load(ALGORITHMS[0].with_name(f"{name.split()[0]}.yaml"))
    for axis, value in EXTRA.get(name, {}).items():
        config[axis] = value
    return instantiate(config)


def make_model(seed=0):
    torch.manual_seed(seed)
    shape = {"vocab_size": 29, "width": 32, "depth": 2, "heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 8}
    shape |= {"qk_rope_head_dim": 4, "v_head_dim": 8, "ffn_width": 48, "experts": 4, "expert_width": 16}
    return Transformer(ModelConfig(**shape, max_seq_len=32, base=Base(width=32, depth=2)))


def make_round(objective, model):
    """(a scored round as the rollout loop makes it, its groups). A new field of the batch is filled here.

    Lengths are ragged, rows have holes, one row of a group and one whole group do not count at all.
    """
    draw = torch.Generator().manual_seed(1)
    prompts = [Prompt(f"{b // G:016x}", "", "", "", (b // G + 1,) * (2 + b // G)) for b in range(B)]
    completions = []
    for b, prompt in enumerate(prompts):
        ids = torch.randint(0, 29, (1 + (5 * b) % 13,), generator=draw).tolist()
        completions.append(Completion(prompt.id, b % G, tuple(ids), (-3.0,) * len(ids), "", "stop", 0, 0))
    batch = collate(prompts, completions, max_completion=16, pad_id=0)
    batch.mask_BT = batch.mask_BT * (torch.rand(batch.mask_BT.shape, generator=draw) > 0.15)  # tools' outputs
    valid_B = torch.arange(B) != 7  # its verifier failed
    batch.mask_BT = batch.mask_BT * valid_B[:, None]
    batch.mask_BT[2 * G : 3 * G] = 0
    assert (batch.mask_BT.sum(1) == 0).sum() > G

    with torch.no_grad():
        own_BT = token_logprobs(model, batch, 1.0)[0]

    def near(spread):
        return (own_BT + spread * torch.randn(own_BT.shape, generator=draw)) * batch.mask_BT

    batch.old_logprobs_BT, batch.ref_logprobs_BT, batch.rollout_logprobs_BT = near(0.3), near(0.5), near(0.3)
    group_B = torch.arange(P).repeat_interleave(G)
    correct_B = torch.rand(B, generator=draw) > 0.5
    rewards_BR = torch.stack([correct_B.float(), torch.rand(B, generator=draw)], 1)
    batch.values_BT = torch.randn(own_BT.shape, generator=draw) * batch.mask_BT
    batch.advantages_BT, batch.returns_BT, batch.marked_BT = objective.assess(
        rewards_BR,
        torch.tensor([1.0, 0.5]),
        group_B,
        batch.mask_BT,
        valid_B=valid_B,
        old_logprobs_BT=batch.old_logprobs_BT,
        ref_logprobs_BT=batch.ref_logprobs_BT,
        values_BT=batch.values_BT,
        greedy_BR=rewards_BR[:1].expand(B, -1),
    )
    return batch, group_B


def micro_batches(objective, model, count):
    batch, group_B = make_round(objective, model)
    return split(batch, range(B), group_B, count)


class Loss(nn.Module):
    """What `PolicyModule.training_step` computes, as the forward of something that DDP can wrap."""

    def __init__(self, model, objective):
        super().__init__()
        reference = None
        if objective.needs_teacher:
            reference = Teacher("another")
            reference.load(lambda name: make_model(seed=7))
        torch.manual_seed(1)
        self.policy = PolicyModule(model, AdamW(), objective, reference=reference)
        if self.policy.critic is not None:
            torch.nn.init.normal_(self.policy.critic.head.weight)

    def forward(self, batch):
        found = self.policy(batch)
        return self.policy.objective.loss(found.logprobs_BT, batch, *found[1:]).loss


class Padded(nn.Module):
    """The same model without packing: every row by itself, padding and all."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head, self.config = model, model.head, model.config

    def states_at(self, input_ids_BT, counts_BT, experts_BTLK=None):
        return self.model.hidden(input_ids_BT).states_BTD[counts_BT]


def flat(loss):
    """Of everything that is trained, the model before what the critic adds."""
    return torch.cat([p.grad.flatten() for p in loss.parameters() if p.requires_grad])


def accumulate(loss, batches):
    """The gradient of the sum of the batches' losses."""
    loss.zero_grad(set_to_none=True)
    for batch in batches:
        loss(batch).backward()
    return flat(loss)


def rank_gradient(name, group, world, own_totals=False):
    """Two micro-batches a rank; DDP averages over the ranks, so each rank's loss is multiplied by their number."""
    model, objective = make_model(), load(name)
    parts = micro_batches(objective, model, 2 * world)[dist.get_rank(group) :: world]
    if own_totals:  # a mistake: as if the step were this rank's rows
        parts = [replace(part, tokens_total=sum(p.mask_BT.sum() for p in parts)) for part in parts]
    loss = DistributedDataParallel(Loss(model, objective), process_group=group)
    with loss.no_sync():
        (loss(parts[0]) * world).backward()
    (loss(parts[1]) * world).backward()
    return flat(loss)


def on_rank(rank, out):
    dist.init_process_group("gloo", f"file://{out}.store", rank=rank, world_size=max(WORLDS))
    found = {}
    for world in WORLDS:
        group = dist.new_group(range(world))
        if rank < world:
            found |= {(name, world): rank_gradient(name, group, world) for name in NAMES}
            found["own totals", world] = rank_gradient("dapo", group, world, own_totals=True)
    dist.barrier()
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    mp.start_processes(on_rank, args=(sys.argv[1],), nprocs=max(WORLDS), start_method="fork")
