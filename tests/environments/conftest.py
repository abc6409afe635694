"""A tiny model, an engine on it, and an environment that a random model does ask."""

import pytest
import torch

from lit_reason.data import ByteTokenizer
from lit_reason.environments import EnvironmentEngine, Step
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.rollout import BuiltinEngine
from lit_reason.types import Prompt


class Echo:
    """Asked by any of the bytes 0..63, it answers with how often it was asked; a seed of 13 is a fault."""

    def __init__(self, max_turns: int = 4) -> None:
        self.max_turns, self.seen = max_turns, []

    def reset(self, prompts, seeds):
        return [(seed, 0) for seed in seeds]

    def asks(self, text):
        return any(ord(letter) < 64 for letter in text)

    def step(self, states, turns):
        self.seen.append([turn.text for turn in turns])
        return [self._step(seed, count + 1, turn) for (seed, count), turn in zip(states, turns, strict=True)]

    def _step(self, seed, count, turn):
        if not self.asks(turn.text):
            return Step((seed, count))
        return Step((seed, count), f"#{count}</answer>", fault="out of order" if seed == 13 else "")


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


@pytest.fixture
def make_model():
    def make(seed: int = 0, max_seq_len: int = 96) -> Transformer:
        torch.manual_seed(seed)
        return Transformer(
            ModelConfig(
                width=32, depth=2, heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
                ffn_width=48, experts=4, expert_width=16, max_seq_len=max_seq_len, base=Base(width=32, depth=2),
            )
        )  # fmt: skip

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def plain(tokenizer, model):
    """The engine alone."""
    engine = BuiltinEngine(tokenizer, dtype="float32")
    engine.push(model, version=3)
    return engine


@pytest.fixture
def echo():
    return Echo


@pytest.fixture
def play(tokenizer, model):
    """`play(environment)`: the engine in it, version 3 pushed."""

    def make(environment) -> EnvironmentEngine:
        engine = EnvironmentEngine(BuiltinEngine(tokenizer, dtype="float32"), environment, tokenizer)
        engine.push(model, version=3)
        return engine

    return make


@pytest.fixture
def prompts():
    def make(n: int) -> list[Prompt]:
        texts = ["1+1", "what is twelve", "abc", "a longer question ?"]
        return [Prompt(f"{i:016x}", t, "2", "test", tuple(t.encode())) for i, t in enumerate(texts * n)][:n]

    return make
