"""One tiny model shape for every test of this folder."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """`scripts/hf_parity.py`."""
    path = Path(__file__).parents[2] / "scripts" / "hf_parity.py"
    spec = importlib.util.spec_from_file_location("hf_parity", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["hf_parity"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.transformers.logging.set_verbosity_error()
    module.transformers.logging.disable_progress_bar()
    return module


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """`tiny(depth=3)`: the tiny shape with changes."""
    return lambda **changes: ModelConfig(**(TINY | changes))


@pytest.fixture
def edit() -> Callable[..., None]:
    """`edit(folder, key=value)`: changes a folder's config.json."""

    def change(folder: Path, **changes: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.fixture
def ladder() -> Callable[[int], ModelConfig]:
    """`ladder(64)`: a shape whose ranks, heads and hidden widths grow with the width; its muP base has width 32."""

    def shape(width: int) -> ModelConfig:
        m = width // 32
        return ModelConfig(
            vocab_size=64, width=width, depth=2, heads=2 * m, kv_lora_rank=16 * m, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=16, ffn_width=64 * m, experts=4, expert_width=32 * m,
            base=Base(width=32, depth=2, heads=2, kv_lora_rank=16, ffn_width=64, expert_width=32),
        )  # fmt: skip

    return shape
