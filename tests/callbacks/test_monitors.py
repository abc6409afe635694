"""Expert load, learning rates, and the guard against non-finite numbers."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_reason.callbacks import ExpertLoad, NonFiniteGuard, RoleLRMonitor
from lit_reason.callbacks.lr_per_role import group_rates
from lit_reason.errors import NonFiniteError


def test_expert_load_over_the_whole_optimizer_step(fit):
    # loads 4, 2, 2, 0: max / mean - 1 = 4 / 2 - 1, the fourth expert got nothing
    trainer, _ = fit([ExpertLoad(per_layer=True)], accumulate_grad_batches=3)
    assert trainer.callback_metrics["expert/max_violation"] == 1.0
    assert trainer.callback_metrics["expert/dead"] == 1.0
    assert trainer.callback_metrics["expert/moe/max_violation"] == 1.0


def test_expert_load_takes_the_worst_layer_and_counts_all_dead(fit):
    module = fit.Tiny()
    module.other = torch.nn.Module()
    module.other.register_buffer("load_E", torch.tensor([9.0, 0.0, 0.0]))
    trainer, _ = fit([ExpertLoad()], module=module)
    assert trainer.callback_metrics["expert/max_violation"] == 2.0  # 9 / 3 - 1
    assert trainer.callback_metrics["expert/dead"] == 3.0


def test_expert_load_says_when_there_is_nothing_to_watch(fit):
    module = fit.Tiny()
    module.training_step = lambda batch, batch_idx: module.last(module.first(batch[0])).mean()
    del module.moe
    module.optimizer_step = lambda *args: type(module).__mro__[1].optimizer_step(module, *args)
    with pytest.warns(UserWarning, match="register_buffer"):
        trainer, _ = fit([ExpertLoad()], module=module)
    assert not any(name.startswith("expert") for name in trainer.callback_metrics)


def test_role_rates(fit):
    trainer, _ = fit([RoleLRMonitor()])
    assert trainer.callback_metrics["lr/hidden"] == pytest.approx(0.1)
    assert trainer.callback_metrics["lr/head"] == pytest.approx(0.01)


def test_groups_without_a_name_or_of_one_name():
    p = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    groups = [
        {"params": [p[0]], "lr": 0.1},
        {"params": [p[1]], "lr": 0.2, "name": "a"},
        {"params": [p[2]], "lr": 0.2, "name": "a"},
        {"params": [p[3]], "lr": 0.3, "name": "b/lr x2"},
    ]
    assert group_rates(torch.optim.SGD(groups)) == {"group0": 0.1, "a": 0.2, "a.2": 0.2, "b.lr_x2": 0.3}


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_guard_stops_before_the_update_and_before_any_checkpoint(fit, tmp_path, bad):
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = fit.Tiny(bad_step=2, bad=bad)
    with pytest.raises(NonFiniteError, match=f"the {bad} is .* at step 2") as caught:
        fit([saver, NonFiniteGuard()], module=module, enable_checkpointing=True)
    if bad == "gradient":
        # d sqrt(w * 0) / dw = 0 * inf is NaN, in the first layer only
        assert "first.weight" in str(caught.value) and "last.weight" not in str(caught.value)
    assert all(p.isfinite().all() for p in module.parameters())
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["step=1.ckpt", "step=2.ckpt"]


def test_without_the_guard_the_weights_would_be_lost(fit):
    _, module = fit([], module=fit.Tiny(bad_step=2))
    assert not all(p.isfinite().all() for p in module.parameters())


def test_weights_that_overflow_in_the_step_itself_are_not_saved(fit, tmp_path):
    """Loss and gradient are finite; a learning rate of inf makes the weights infinite all the same."""
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = fit.Tiny()

    def too_fast(module, step):
        if step == 1:
            module.optimizers().param_groups[1]["lr"] = float("inf")

    module.announce = too_fast
    with pytest.raises(
        NonFiniteError, match=r"not finite after step 2 in 1 of 2 parameters: last\.weight; .*not saved"
    ):
        fit([saver, NonFiniteGuard()], module=module, enable_checkpointing=True)
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["step=1.ckpt"]


def test_guard_lets_a_healthy_run_pass(fit):
    trainer, _ = fit([NonFiniteGuard()], accumulate_grad_batches=2)
    assert trainer.global_step == 4
