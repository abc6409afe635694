"""What `Checkpoint` saves, and that a run interrupted twice is the same run."""

import pytest
import torch
from lightning.pytorch import Callback

from lit_reason.checkpoint import Checkpoint, find_resume


class StopAt(Callback):
    """Raises, or stops in peace, after `batches` micro-batches of this process."""

    def __init__(self, batches, error=True):
        self.left, self.error = batches, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.left -= 1
        if self.left < 0 and self.error:
            raise InterruptedError
        trainer.should_stop = self.left <= 0 and not self.error


def names(folder):
    return sorted(path.stem for path in folder.glob("*.ckpt"))


# An epoch of the loader has 7 micro-batches: with accumulation 4 two steps, the second of 3.
def test_interrupted_twice_in_the_middle_of_a_step_is_the_same_run(tmp_path, tiny):
    def run(name, *callbacks, **kwargs):
        saver = Checkpoint(tmp_path / name, every_n_train_steps=3)
        return tiny(tmp_path / name, 8, [saver, *callbacks], accumulate_grad_batches=4, **kwargs)

    whole = run("whole")
    half = tmp_path / "half"
    with pytest.raises(InterruptedError):
        run("half", StopAt(13))  # two micro-batches after step 3 (4 + 3 + 4 = 11)
    assert names(half) == ["step=3"]
    with pytest.raises(InterruptedError):
        run("half", StopAt(1), ckpt_path=find_resume(half), seed=5)
    assert names(half) == ["step=3"]
    resumed = run("half", ckpt_path=find_resume(half), seed=6)
    assert names(tmp_path / "whole") == ["step=6", "step=8"]
    assert names(half) == ["step=3", "step=6", "step=8"]  # Lightning never deletes what a run resumed from
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("longer", [3, 9])
def test_the_last_step_is_saved_and_can_be_continued(tmp_path, tiny, longer):
    """3 steps end inside the second epoch."""
    kwargs = {"accumulate_grad_batches": 4}
    whole = tiny(tmp_path / "whole", longer, **kwargs)
    tiny(tmp_path / "half", 3, [Checkpoint(tmp_path / "half")], **kwargs)
    assert names(tmp_path / "half") == ["step=3"]
    resumed = tiny(tmp_path / "half", longer, ckpt_path=find_resume(tmp_path / "half"), seed=5, **kwargs)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_stop_in_the_middle_of_a_step_saves_nothing(tmp_path, tiny):
    callbacks = [Checkpoint(tmp_path, every_n_train_steps=1), StopAt(6, error=False)]
    tiny(tmp_path, 8, callbacks, accumulate_grad_batches=4)
    assert names(tmp_path) == ["step=1"]
