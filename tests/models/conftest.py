"""One tiny model shape for every test of this folder."""

from collections.abc import Callable
from typing import Any

import pytest

from lit_reason.models import Base, ModelConfig

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "ffn_width": 48,
    "first_dense": 1,
    "experts": 8,
    "experts_per_token": 2,
    "expert_width": 16,
    "max_seq_len": 96,
    "base": Base(width=32, depth=2),
}


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """`tiny(depth=3)`: the tiny shape with changes."""
    return lambda **changes: ModelConfig(**(TINY | changes))
