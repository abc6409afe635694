"""info.json: what a card must say; README.md: the card, written from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_reason.errors import ZooError

REQUIRED = {
    "recipe": "the command that made it, e.g. 'lit-reason-train experiment=arith_sft seed=1'",
    "seed": "an integer",
    "commit": "the code's commit",
    "metrics": "{'pass_at_1': {'value': 0.52, 'ci': [0.48, 0.56], 'n': 500}, ...}",
}


def check_info(info: Mapping[str, Any]) -> None:
    """Refuse a card that does not say where the model comes from, or a number without its interval."""
    missing = [f"{key} ({what})" for key, what in REQUIRED.items() if key not in info]
    if missing:
        raise ZooError(f"info lacks {', '.join(missing)}; got {sorted(info)}")
    for name, metric in info["metrics"].items():
        if not isinstance(metric, Mapping) or not {"value", "ci"} <= metric.keys():
            raise ZooError(f"info['metrics'][{name!r}] is {metric!r}; give it as {REQUIRED['metrics']}")
        low, high = metric["ci"]
        if not low <= metric["value"] <= high:
            raise ZooError(f"info['metrics'][{name!r}]: value {metric['value']} is outside {low} .. {high}")


def write_card(name: str, info: Mapping[str, Any]) -> str:
    """The model card in Markdown."""
    rows = [
        f"| {metric} | {m['value']:.4g} | {m['ci'][0]:.4g} .. {m['ci'][1]:.4g} | {m.get('n', '')} |"
        for metric, m in info["metrics"].items()
    ]
    extra = {k: v for k, v in info.items() if k not in {*REQUIRED, "name", "description", "params", "dtype"}}
    lines = [
        f"# {name}",
        "",
        str(info.get("description", "A lit_reason model.")),
        "",
        f"{info['params']:,} parameters, {info['dtype']}.",
        "",
        "| metric | value | 95% interval | n |",
        "|---|---|---|---|",
        *rows,
        "",
        "## Where it comes from",
        "",
        f"- recipe: `{info['recipe']}`",
        f"- seed: {info['seed']}",
        f"- commit: `{info['commit']}`",
        *[f"- {key}: {value}" for key, value in extra.items()],
        "",
        "## Use",
        "",
        "```python",
        "from lit_reason import zoo",
        f'model, tokenizer = (m := zoo.load("{name}")).model, m.tokenizer',
        "```",
        "",
        f"`lit-reason-zoo verify {name}` checks every file's sha256 and recomputes `golden.json`.",
    ]
    return "\n".join(lines) + "\n"
