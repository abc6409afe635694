"""The parameters behind the keys: which may be added, and records that hold their defaults."""

import pytest

from lit_reason.config.parameters import may_add, with_defaults
from lit_reason.errors import ConfigError

TREE = {
    "model": {"_target_": "lit_reason.models.ModelConfig", "width": 64},
    "rollout": {"log_kl": True, "sampling": {"_target_": "lit_reason.rollout.Sampling"}},
    "trainer": {"_target_": "lightning.pytorch.Trainer", "devices": 1},
    "sft": {},
}


@pytest.mark.parametrize(
    ("path", "valid"),
    [
        ("model.rope_theta", True),
        ("model.base.width", True),
        ("model.rope_tehta", False),
        ("model._partial_", False),
        ("rollout.sampling.top_p", True),
        ("rollout.top_p", False),
        ("rope_theta", False),
        ("sft.model.width", True),
        ("sft.model.rope_theta", True),
        ("sft.rollout.log_kl", True),
        ("sft.model.rope_tehta", False),
        ("sft.nothing.width", False),
        ("rollout.model.width", False),
    ],
)
def test_what_may_be_added(path, valid):
    assert may_add(TREE, path) is valid


def test_a_default_that_is_spelt_out_changes_no_record():
    spelt_out = {**TREE, "model": {**TREE["model"], "rope_theta": 10_000.0, "yarn": None}}
    other = {**TREE, "model": {**TREE["model"], "rope_theta": 5e5}}
    assert with_defaults(spelt_out) == with_defaults(TREE) != with_defaults(other)


def test_an_old_record_is_filled_around_what_no_longer_exists():
    old = {**TREE, "reward": {"_target_": "lit_reason.rewards.GoneReward", "weight": 1.0}}
    filled = with_defaults(old, lenient=True)
    assert filled["reward"] == old["reward"] and filled["model"] == with_defaults(TREE)["model"]
    with pytest.raises(ConfigError, match="GoneReward does not exist"):
        with_defaults(old)


def test_a_record_holds_plain_defaults_but_neither_lightnings_nor_what_code_hands_in():
    record = with_defaults({**TREE, "optimizer": {"_target_": "lit_reason.optim.AdamW"}}, leave_out=["model.heads"])
    assert record["rollout"]["sampling"]["top_p"] == 1.0 and record["model"]["width"] == 64
    assert record["optimizer"]["betas"] == [0.9, 0.95]  # a list: what YAML and JSON give back
    assert record["trainer"] == TREE["trainer"] and "heads" not in record["model"]
    assert "base" not in record["model"]  # an object, no plain value
