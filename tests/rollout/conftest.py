"""A tiny model with the byte tokenizer's vocabulary, and prompts of different lengths."""

import pytest
import torch

from lit_reason.data.tokenizer import ByteTokenizer
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.rollout import BuiltinEngine
from lit_reason.types import Prompt


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def make_model():
    """`make_model(seed, stop_gain)`: a random model; a higher gain ends more completions early."""

    def make(seed: int = 0, stop_gain: float = 4.0, max_seq_len: int = 64) -> Transformer:
        torch.manual_seed(seed)
        model = Transformer(
            ModelConfig(
                width=32, depth=2, heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
                ffn_width=48, experts=4, expert_width=16, max_seq_len=max_seq_len, base=Base(width=32, depth=2),
            )
        )  # fmt: skip
        with torch.no_grad():
            model.head.weight[ByteTokenizer().stop_ids[0]] *= stop_gain
        return model

    return make


@pytest.fixture
def model(make_model) -> Transformer:
    return make_model()


@pytest.fixture
def engine(tokenizer, model) -> BuiltinEngine:
    engine = BuiltinEngine(tokenizer, dtype="float32")
    engine.push(model, version=3)
    return engine


@pytest.fixture
def prompts():
    """`prompts(n)`: n prompts of 3..19 tokens, some of them twice."""

    def make(n: int) -> list[Prompt]:
        texts = ["1+1", "what is twelve", "abc", "a longer question ?"]
        return [Prompt(f"{i:016x}", t, "", "test", tuple(t.encode())) for i, t in enumerate(texts * n)][:n]

    return make
