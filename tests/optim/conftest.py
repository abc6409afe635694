"""A small model with every kind of matrix, and gradients for it."""

import pytest
import torch

from lit_reason.models import Base, ModelConfig, Transformer

SHAPE = {
    "vocab_size": 40, "width": 32, "depth": 2, "heads": 2, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 10, "ffn_width": 48, "experts": 4, "experts_per_token": 2, "expert_width": 16,
    "max_seq_len": 64, "base": Base(width=32, depth=2),
}  # fmt: skip


@pytest.fixture
def make_model():
    def make(seed: int = 0, **changes) -> Transformer:
        torch.manual_seed(seed)
        return Transformer(ModelConfig(**SHAPE | changes))

    return make


@pytest.fixture
def set_gradients():
    """`set_gradients(model, step)`: random gradients that depend on the step alone."""

    def set_(model, step: int = 0, scale: float = 1.0) -> None:
        draw = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = scale * torch.randn(p.shape, generator=draw)

    return set_
