"""A tiny model on a shelf of its own."""

import pytest
import torch

from lit_reason import zoo
from lit_reason.data.tokenizer import ByteTokenizer
from lit_reason.models import ModelConfig, Transformer

INFO = {
    "recipe": "lit-reason-train experiment=tiny",
    "seed": 1,
    "commit": "0123abc",
    "description": "A tiny model for tests.",
    "metrics": {"pass_at_1": {"value": 0.5, "ci": [0.25, 0.75], "n": 16}},
}


@pytest.fixture
def info():
    return {**INFO, "metrics": {k: dict(v) for k, v in INFO["metrics"].items()}}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        width=32, depth=2, heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        ffn_width=64, experts=4, experts_per_token=2, expert_width=16, max_seq_len=64,
    )  # fmt: skip
    return Transformer(config)


@pytest.fixture
def shelf(tmp_path, model, info):
    """A shelf with one model, `tiny.sft`."""
    zoo.save("tiny.sft", model, ByteTokenizer(), info, shelf=tmp_path / "shelf")
    return tmp_path / "shelf"
