"""What a person sees while it runs: with a terminal a second bar, without one plain lines."""

import io
import re
import time

import pytest
import rich
from lightning.pytorch.callbacks import RichProgressBar

from lit_reason.callbacks import PlainProgress, RolloutProgress, progress_bar
from lit_reason.callbacks.progress import clock, generation_line, step_line
from lit_reason.rollout import Progress


def generating(events, pause=0.0):
    def announce(module, step):
        for event in events:
            for callback in module.trainer.callbacks:
                if hasattr(callback, "on_generation_progress"):
                    callback.on_generation_progress(module.trainer, module, event)
            time.sleep(pause)
            module.seen = getattr(module, "seen", []) + [bar_state(module.trainer)]

    return announce


def bar_state(trainer):
    display = getattr(trainer.progress_bar_callback, "progress", None)
    tasks = [task for task in display.tasks if "Generating" in task.description] if display else []
    return [(t.description, t.completed, t.total, t.visible) for t in tasks]


def test_lines_by_hand():
    # 96 of 256 in 60 s: 160 more at 1.6/s take 100 s
    assert generation_line(Progress(96, 256, 6000, 60.0)) == "generating 96/256 samples  100 tokens/s  ETA 1:40"
    assert generation_line(Progress(0, 256, 0, 0.0)) == "generating 0/256 samples  0 tokens/s  ETA --:--"
    assert [clock(5), clock(65), clock(3725)] == ["0:05", "1:05", "1:02:05"]
    metrics = {"loss": 0.5, "reward/answer/mean": 0.25, "speed/generate_tokens_per_s": 1234.0, "kl/k1": 1.0}
    assert step_line(3, 10, metrics, 65) == "step 3/10  loss 0.5000  answer 0.250  1,234 tokens/s  ETA 1:05"


def test_plain_progress_prints_one_line_per_optimizer_step(fit, capsys):
    fit([PlainProgress()], steps=3, accumulate_grad_batches=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all(re.fullmatch(r"step \d/3  loss \d\.\d{4}  ETA \d:\d\d", line) for line in lines)


def test_plain_progress_every_n_keeps_first_and_last(fit, capsys):
    fit([PlainProgress(every_n_steps=4)], steps=10)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "8/10", "10/10"]


def test_generation_lines_without_a_terminal_are_rate_limited(fit, capsys):
    events = [Progress(i, 10, i * 5, float(i)) for i in range(1, 11)]
    for every, expected in ((0.0, 9), (1e6, 0)):
        # the tenth event, "all done", is no line: the step's own line follows
        fit([PlainProgress(), RolloutProgress(every)], steps=1, module=fit.Tiny(generating(events)))
        assert capsys.readouterr().out.count("generating") == expected


def test_generation_has_its_own_bar_on_a_terminal(fit):
    console = {"file": io.StringIO(), "force_terminal": True, "width": 120}
    module = fit.Tiny(generating([Progress(2, 8, 50, 2.0), Progress(6, 8, 150, 5.0), Progress(8, 8, 200, 6.0)], 0.1))
    try:
        fit([RichProgressBar(console_kwargs=console), RolloutProgress()], steps=2, module=module)
    finally:
        rich.reconfigure()  # Lightning gave rich's global console our file
    round_ = [
        [("Generating 25 tokens/s", 2, 8, True)],
        [("Generating 30 tokens/s", 6, 8, True)],
        [("Generating 33 tokens/s", 8, 8, False)],
    ]
    assert module.seen == round_ * 2
    assert "Generating 30 tokens/s" in console["file"].getvalue()


def test_rollout_progress_alone_in_a_trainer_without_bar(fit, capsys):
    fit([RolloutProgress(0.0)], steps=1, module=fit.Tiny(generating([Progress(1, 2, 1, 1.0)] * 3)))
    assert "generating" not in capsys.readouterr().out


@pytest.mark.parametrize(("tty", "kind"), [(True, RichProgressBar), (False, PlainProgress)])
def test_progress_bar_fits_the_terminal(monkeypatch, tty, kind):
    monkeypatch.setattr("sys.stdout", type("Out", (io.StringIO,), {"isatty": lambda self: tty})())
    assert type(progress_bar()) is kind
