"""When swaps come and go in a real Trainer, what is said of them, and who may claim what."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lit_kernels.swap import ClaimedError, Swap
from torch import nn

from lit_reason.callbacks.swapping import Change, Swapping, chosen_layers, repeated_blocks, swapped


class Doubled(Swap):
    def forward(self, x):
        return 2 * super().forward(x)


class Double(Swapping):
    """Doubles every layer with three outputs."""

    def changes(self, model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module.out_features == 3:
                yield swapped(name, module, "doubled", Doubled)
            elif isinstance(module, nn.Linear):
                yield Change(name, module, "it has not three outputs")

    def missing(self):
        return "Double found nothing. Type Double(anything=True)"


class Seen(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.kind, self.out = type(pl_module.first).__name__, pl_module.first(batch[0])
        self.plain = nn.functional.linear(batch[0], pl_module.first.weight)
        self.optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}


def test_swapped_in_the_fit_and_back_after_it(fit):
    seen, callback = Seen(), Double()
    _, module = fit([callback, seen], steps=2)
    assert seen.kind == "DoubledLinear" and torch.equal(seen.out, 2 * seen.plain)
    assert seen.optimized == {id(p) for p in module.parameters()}
    assert type(module.first) is nn.Linear
    assert callback.report.changed == {"first": "doubled"}
    assert callback.report.declined == {"last": "it has not three outputs"}


def test_back_after_an_exception(fit):
    def fail(module, step):
        assert type(module.first) is not nn.Linear
        raise RuntimeError("on purpose")

    module = fit.Tiny(announce=fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit([Double()], module=module)
    assert type(module.first) is nn.Linear


def test_a_model_made_in_configure_model_is_found(fit):
    class Late(fit.Tiny):
        def configure_model(self):
            self.first, self.last = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)

    seen, module = Seen(), Late()
    module.first, module.last = nn.Identity(), nn.Identity()
    fit([Double(), seen], steps=1, module=module)
    assert seen.kind == "DoubledLinear" and type(module.first) is nn.Linear


def test_a_model_made_in_part_later_is_swapped_whole(fit):
    class Partly(fit.Tiny):
        def configure_model(self):
            self.last = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False))

        def on_train_start(self):
            assert type(self.first).__name__ == type(self.last[0]).__name__ == "DoubledLinear"

    callback = Double()
    fit([callback], steps=1, module=Partly())
    assert set(callback.report.changed) == {"first", "last.0"}


def test_one_warning_says_that_nothing_was_found(fit):
    class Nothing(Double):
        def changes(self, model):
            yield Change("last", model, "too small")

    with pytest.warns(
        UserWarning, match=r"(?s)Nothing: 0 modules changed, 1 declined.*too small.*Type Double\("
    ) as seen:
        fit([Nothing()], steps=1)
    assert sum("0 modules changed" in str(w.message) for w in seen) == 1


def test_two_callbacks_on_one_module_are_an_error_and_leave_nothing(fit):
    module = fit.Tiny()
    with pytest.raises(ClaimedError, match="first: Doubled wants to replace what it computes"):
        fit([Double(), Double()], module=module)
    assert type(module.first) is nn.Linear


def test_models_beside_the_module_are_swapped_too(fit):
    beside = nn.Linear(2, 3)

    class Pair(fit.Tiny):
        def computes_alike(self):
            return [beside, self.first]  # a part of the module is swapped once

        def on_train_start(self):
            assert type(beside) is not nn.Linear

    fit([Double()], steps=1, module=Pair())
    assert type(beside) is nn.Linear


def test_a_forward_on_the_object_is_not_hidden():
    layer = nn.Linear(2, 3)
    layer.forward = lambda x: x
    report = Double().apply(nn.ModuleDict({"a": layer}))
    assert not report.changed and "replaced on the object" in report.declined["a"]


def test_a_report_names_a_few_and_counts_all():
    report = Double().apply(nn.ModuleList([nn.Linear(2, 3) for _ in range(6)]))
    assert str(report) == ("Double: 6 modules changed, 0 declined\n  changed: 0, 1, 2, 3, ... (6 in all): doubled")


def test_layers_are_the_outermost_lists_of_one_class():
    def block():
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})

    model = nn.ModuleDict({
        "mixed": nn.ModuleList([nn.Linear(2, 2), nn.Tanh()]),
        "layers": nn.ModuleList([block(), block()]),
        "single": nn.ModuleList([block()]),
    })  # fmt: skip
    found = [name for name, _ in repeated_blocks(model)]
    assert found == ["layers.0", "layers.1", "single.0.experts.0", "single.0.experts.1"]
    assert [name for name, _ in chosen_layers(model, ["layers.*"])] == ["layers.0", "layers.1"]
    assert [name for name, _ in chosen_layers(model, ["experts"])] == [
        f"{name}.experts" for name in ("layers.0", "layers.1", "single.0")
    ]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_compute_what_one_does(strategy, tmp_path):
    """Grouped experts, a fused loss and checkpointed layers on two gloo processes, DDP or `fully_shard`."""
    worker = Path(__file__).with_name("sharded_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker, strategy]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same on rank") == 2
