"""Training 10 steps equals 5 + resume + 5, bit for bit, dropout on."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_reason.checkpoint import SafeCheckpointIO, find_resume, get_rng_state, set_rng_state


def draws():
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss(0, 1)]


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "second gaussian cached"])
def test_state_round_trip(cached):
    if cached:
        np.random.randn()
        random.gauss(0, 1)
    state = get_rng_state()
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    first = draws()
    assert draws() != first
    set_rng_state(state)
    assert draws() == first


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# The loader has 7 batches: 5 is mid-epoch, 7 its last batch, 9 in the second epoch; with accumulation 2 an epoch has
# 4 optimizer steps, the last of a single batch.
@pytest.mark.parametrize(("stop", "accumulate"), [(5, 1), (7, 1), (9, 1), (3, 2), (4, 2), (6, 2)])
def test_resume_is_exact_with_dropout(tmp_path, tiny, stop, accumulate):
    keep = {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
    kwargs = {"accumulate_grad_batches": accumulate}
    whole = tiny(tmp_path / "whole", 10, **kwargs)
    tiny(tmp_path / "half", stop, [ModelCheckpoint(tmp_path / "half", **keep)], **kwargs)
    resumed = tiny(tmp_path / "half", 10, ckpt_path=find_resume(tmp_path / "half"), seed=123, **kwargs)
    assert same(whole, resumed)


def test_draws_between_loading_and_the_first_batch_do_no_harm(tmp_path, tiny):
    """iter(DataLoader) draws a seed in the set-up of the fit, after the checkpoint is loaded."""

    def drawing(self):
        torch.rand(1)
        return plain(self)

    plain = tiny.Cursor.__iter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.Cursor, "__iter__", drawing)
        whole = tiny(tmp_path / "whole", 10)
        tiny(tmp_path / "half", 5, [ModelCheckpoint(tmp_path / "half", every_n_train_steps=5)])
        resumed = tiny(tmp_path / "half", 10, ckpt_path=find_resume(tmp_path / "half"), seed=123)
    assert same(whole, resumed)


def test_dropout_makes_the_generator_matter(tmp_path, tiny):
    """The test above would pass without RNGState if nothing drew from the generator."""
    whole = tiny(tmp_path / "whole", 10)
    tiny(tmp_path / "half", 5, [ModelCheckpoint(tmp_path / "half", every_n_train_steps=5)])
    resumed = tiny(tmp_path / "half", 10, ckpt_path=find_resume(tmp_path / "half"), seed=123, rng=False)
    assert not same(whole, resumed)


def test_every_rank_has_its_own_state(tmp_path, tiny):
    """Two processes draw different dropout masks; each continues its own stream."""
    ranks = {"devices": 2, "strategy": "ddp_fork"}
    tiny(tmp_path / "whole", 6, [PerRank(), keep_all(tmp_path / "whole")], **ranks)
    tiny(tmp_path / "half", 3, [PerRank(), keep_all(tmp_path / "half")], **ranks)
    tiny(tmp_path / "half", 6, [keep_all(tmp_path / "half")], ckpt_path=find_resume(tmp_path / "half"), **ranks)
    whole, half = (SafeCheckpointIO().load_checkpoint(tmp_path / name / "step=6.ckpt") for name in ("whole", "half"))
    assert all(map(torch.equal, whole["state_dict"].values(), half["state_dict"].values()))
    first, second = whole["callbacks"]["lit_reason.RNGState"]["ranks"]
    assert not torch.equal(first["torch"], second["torch"])


def keep_all(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


class PerRank(Callback):
    def on_train_start(self, trainer, pl_module):
        torch.manual_seed(1000 + trainer.global_rank)
