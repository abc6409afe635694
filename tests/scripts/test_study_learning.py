"""The pure parts of the studies of learning: names, figures of a run, tables."""

import pytest

RUN = {
    "curves": {
        "answer": [0.3, 0.5, 0.6, 0.6, 0.6, 0.7, 0.7],
        "kl": [0.0, 0.1, 0.4, 0.2, 0.2, 0.2, 0.2],
        "kl_largest": [0.4],
        "ratio_q99": [1.0] * 7,
        "tokens": [1000.0 * n for n in range(1, 8)],
    },
    "held_out": 0.8,
}


@pytest.fixture(scope="module")
def learning(load):
    return load("study_learning").learning


def test_tokens_to_reach_is_by_a_running_mean_of_five(learning):
    """Means of rounds 1-5, 2-6, 3-7: 0.52, 0.60, 0.64; the second reaches 0.6, after 6000 tokens."""
    assert learning.tokens_to_reach(RUN) == 6.0
    low = {"curves": RUN["curves"] | {"answer": [0.1] * 7}}
    assert learning.tokens_to_reach(low) == 7.0


def test_summary_is_paired_by_seed_against_the_first_arm(learning):
    """Arm b is 0.1 and 0.3 above arm a at equal seeds: mean 0.2, and t(1) = 12.7062 times 0.1."""
    study = learning.Study({"a": (), "b": ()})
    runs = [
        RUN | {"arm": arm, "seed": seed, "held_out": value}
        for arm, values in {"a": (0.2, 0.5), "b": (0.3, 0.8)}.items()
        for seed, value in enumerate(values, 1)
    ]
    found = learning.summary(study, runs)["held-out accuracy"]
    assert found["arms"]["a"].mean == pytest.approx(0.35)
    mean, low, high = found["minus"]["b"]
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 1.27062, 0.2 + 1.27062), abs=1e-4)


def test_the_same_arm_in_two_studies_is_one_training_and_hydra_can_read_its_name(learning):
    opd, lora = (learning.STUDIES[name].arms["GRPO"] for name in ("opd", "lora"))
    one, other = (learning.training(arm, 1, 40) for arm in (opd, lora))
    assert one == other
    names = [learning.training(arm, 1, 40).name for s in learning.STUDIES.values() for arm in s.arms.values()]
    assert all(set("=,{}[] ").isdisjoint(name) for name in names)
    assert len(names) == 11 and len(set(names)) == 9  # the demo's GRPO three times


def test_every_arm_is_a_configuration_that_passes_every_check(learning):
    from lit_reason.cli import train
    from lit_reason.config.compose import compose
    from lit_reason.config.stage import without_hydra

    for study in learning.STUDIES.values():
        for arm in study.arms.values():
            train.check(without_hydra(compose("train", list(learning.training(arm, 1, 40).overrides))))
