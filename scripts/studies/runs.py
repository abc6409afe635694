"""The trainings of a study: started when missing, and read back.

A study names its trainings as `Training(name, overrides)`. Each is one `lit-reason-train` in a process of its own, with
its output in `<folder>/<name>.log`; what is done is skipped, what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_reason.report.records import read_metrics, read_rows

ROOT = Path(__file__).resolve().parents[2]
TOLD = "overrides.json"


@dataclass(frozen=True)
class Training:
    """One run of `lit-reason-train`.

    Args:
        name: of its folder.
        overrides: its arguments, without `run_dir`.
        last: the stage that ends it.
    """

    name: str
    overrides: tuple[str, ...]
    last: str = "rl"

    def command(self, folder: Path) -> list[str]:
        return [sys.executable, "-m", "lit_reason.cli.train", *self.overrides, f"run_dir={folder / self.name}"]

    def done(self, folder: Path) -> bool:
        """Whether it reached its goal, with these overrides.

        Raises:
            SystemExit: it was run with other ones.
        """
        told = folder / self.name / TOLD
        if told.exists() and (former := json.loads(told.read_text())) != list(self.overrides):
            changed = sorted(set(former) ^ set(self.overrides))
            raise SystemExit(f"{told.parent} was run with other settings ({', '.join(changed)}); move it away")
        return (folder / self.name / self.last / "done.json").exists()


def run_missing(trainings: Sequence[Training], folder: Path) -> None:
    """Run what is not done yet, one after the other, from the repository's root.

    Args:
        folder: of the trainings; relative to the root, as paths in their overrides are.
    """
    missing = [training for training in trainings if not training.done(ROOT / folder)]
    print(f"{len(trainings) - len(missing)} of {len(trainings)} trainings are done", flush=True)
    for number, training in enumerate(missing, 1):
        home = ROOT / folder / training.name
        home.mkdir(parents=True, exist_ok=True)
        (home / TOLD).write_text(json.dumps(training.overrides))
        log, start = home.with_name(f"{training.name}.log"), time.perf_counter()
        _run(training.command(folder), log)
        print(f"{training.name}: {time.perf_counter() - start:.0f} s, {number} of {len(missing)}", flush=True)


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False).returncode
    if code:
        raise SystemExit(f"{command[2]} ended with code {code}; read {log}")


def curve(run_dir: Path, metric: str) -> list[float]:
    """One number per optimizer step, of what a stage logged.

    Raises:
        SystemExit: a step lacks it, or it never was logged.
    """
    rows = read_metrics(run_dir)
    if missing := [row["step"] for row in rows if metric not in row]:
        raise SystemExit(f"{run_dir}: {metric} is missing at steps {missing[:5]}; logged are {', '.join(rows[0])}")
    return [row[metric] for row in rows]


def rounds(run_dir: Path) -> Iterator[list[dict[str, Any]]]:
    """The completions of a stage, round by round: the rows that the callback `CompletionsTable` wrote."""
    for path in sorted((run_dir / "completions").glob("step-*.jsonl")):
        yield read_rows(path)


def held_out(run_dir: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The greedy completions of held-out problems by a stage's final weights: `lit-reason-eval`, done once and kept."""
    home = run_dir / "held_out"
    if not (home / "items.jsonl").exists():
        home.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "lit_reason.cli.eval", f"checkpoint=dir:{run_dir / 'model'}", *overrides]
        _run([*command, f"run_dir={home}"], home / "log")
    return read_rows(home / "items.jsonl")


def trained_by(run_dir: Path) -> str:
    """The commit of the code that trained a stage."""
    return str(read_json(run_dir / "model" / "info.json")["commit"])


def read_json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
