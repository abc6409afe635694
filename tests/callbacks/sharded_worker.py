"""Run by test_swapping.py on two processes: gradients of a swapped model under DDP or FSDP2 against a plain one's."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lit_reason.callbacks import ActivationCheckpointing, FusedLogProb, GroupedGEMM

CONFIG = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 32,
}  # fmt: skip


def build():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**CONFIG)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().train()


def gradients(model):
    full = lambda g: g.full_tensor() if isinstance(g, DTensor) else g  # noqa: E731
    return {name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def main():
    dist.init_process_group("gloo")
    rank, strategy = dist.get_rank(), sys.argv[1]
    ids_RBT = torch.randint(0, 48, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    plain = build()
    torch.stack([plain(input_ids=ids, labels=ids).loss for ids in ids_RBT]).mean().backward()
    expected = gradients(plain)

    model = build()
    callbacks = [GroupedGEMM(), FusedLogProb(), ActivationCheckpointing()]
    for callback in callbacks:
        assert callback.apply(model).changed, callback.report
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    model(input_ids=ids_RBT[rank], labels=ids_RBT[rank]).loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )
    print("the same on rank", rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
