"""Every shipped data config builds what it says, through the project's own instantiate."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_reason.config import check_config, instantiate
from lit_reason.data import PromptData

CONF = Path(__file__).parents[2] / "conf" / "data"
GSM_FILES = Path(__file__).parent / "files" / "gsm8k"


def overrides(name, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(f'{{"question": "number {i}?", "answer": "{i}"}}\n' for i in range(100)))
    return {
        "arith": ["source.size=200"],
        "gsm8k": [f"source.path={GSM_FILES}", "held_out_fraction=0.3"],
        "jsonl": [f"source.path={mine}"],
        "reasoning_gym": ["source.tasks={gcd: {max_value: 50}, lcm: {}}", "source.size=100"],
    }[name]


# That of the verifiers library needs the library: tests/environments/test_verifiers.py.
@pytest.mark.parametrize("name", sorted({path.stem for path in CONF.glob("*.yaml")} - {"verifiers"}))
def test_config_builds_both_sides_of_the_split(name, tmp_path):
    node = OmegaConf.load(CONF / f"{name}.yaml")
    node.merge_with_dotlist(overrides(name, tmp_path))
    check_config(node)
    data = instantiate(node)
    assert isinstance(data, PromptData)
    train, test = data.train_prompts(), data.test_prompts()
    sizes = {"arith": 200, "gsm8k": 20, "jsonl": 100, "reasoning_gym": 100}
    assert len(train) + len(test) == sizes[name] and not {p.id for p in train} & {p.id for p in test}
    assert all(p.token_ids for p in train + test)
