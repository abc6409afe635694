"""The shipped YAMLs compose, nest under their own names and build what they say."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lit_reason.rewards import Reward, Rubric

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "reward").glob("*.yaml"))


def composed(tmp_path, *overrides):
    (tmp_path / "root.yaml").write_text(
        f"hydra:\n  searchpath: [file://{CONF}]\ndefaults:\n  - reward: [answer]\n  - _self_\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        return compose("root", overrides=list(overrides))


@pytest.mark.parametrize("name", NAMES)
def test_each_builds_a_reward(tmp_path, name):
    asked_for = ["reward.verifiers.name=x"] if name == "verifiers" else []
    config = composed(tmp_path, f"reward=[{name}]", f"reward.{name}.weight=0.125", *asked_for)
    assert list(config.reward) == [name]
    reward = instantiate(config.reward[name])
    assert isinstance(reward, Reward) and reward.weight == 0.125


def test_a_list_of_rewards_is_a_rubric_in_that_order(tmp_path):
    config = composed(tmp_path, "reward=[answer,format,length]", "reward.format.weight=0.2")
    rubric = Rubric({name: instantiate(node) for name, node in config.reward.items()})
    assert rubric.weights == {"answer": 1.0, "format": 0.2, "length": 0.1}
