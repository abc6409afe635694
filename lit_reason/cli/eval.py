"""`lit-reason-eval checkpoint=arith-1m.gdpo data=arith n=500 k=4`: accuracy on held-out problems, with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from lit_reason.cli.launch import check_count, check_device, launch, pick_device
from lit_reason.config import check_config, check_run

if TYPE_CHECKING:
    from lit_reason.evaluate import EvalReport


def main() -> None:
    """The console script."""
    launch("eval", run, check)


def check(cfg: DictConfig) -> None:
    """What can be known to be wrong before the model is loaded."""
    check_run(cfg)
    check_count(cfg, "n", least=1)
    check_count(cfg, "k", least=0)
    check_device(cfg)
    check_config(OmegaConf.masked_copy(cfg, ["data", "reward", "rubric", "rollout", "environment"]), cfg.allow_targets)


def run(cfg: DictConfig) -> EvalReport:
    """Evaluate, print the table, write `items.jsonl` and `summary.json`; earlier ones are renamed, not overwritten."""
    from lit_reason.cli.build import build
    from lit_reason.cli.engines import open_engine
    from lit_reason.cli.stages import evaluate_model, load_checkpoint
    from lit_reason.report.records import set_aside

    model, tokenizer = load_checkpoint(cfg.checkpoint)
    data = build(cfg, "data", tokenizer=tokenizer)
    with open_engine(cfg, tokenizer, data.chat, data.prompts("all")) as engine:
        report = evaluate_model(cfg, model, data, pick_device(cfg.device), engine)
    items, summary = Path(cfg.run_dir) / "items.jsonl", Path(cfg.run_dir) / "summary.json"
    for path in (items, summary):
        set_aside(path)
    report.write_jsonl(items)
    facts = {"checkpoint": str(cfg.checkpoint), "seed": cfg.seed} | report.summary()
    summary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    show(report, items)
    return report


def show(report: EvalReport, items: Path) -> None:
    """The report as a table, and where the items are."""
    from rich.console import Console
    from rich.table import Table

    rows = {"pass@1 (greedy)": report.pass_at_1, "pass@1, format-blind": report.pass_at_1_format_blind}
    if report.k:
        rows |= {f"avg@{report.k}": report.avg_at_k, f"maj@{report.k}": report.maj_at_k}
        rows |= {f"pass@{j}": value for j, value in report.pass_at_k.items()}
    rows |= {f"reward {name}": value for name, value in report.rewards.items()}
    table = Table("", "mean", "95% interval", "problems")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, f"{value.value:.3f}", f"{value.low:.3f} .. {value.high:.3f}", str(value.n))
    console = Console()
    console.print(table)
    if report.faults:
        console.print(f"{report.faults} completions could not be judged and are left out", style="yellow")
    console.print(f"{report.tokens / report.seconds:,.0f} tokens/s; every completion: {items}", soft_wrap=True)


if __name__ == "__main__":
    main()
