"""`lit-reason-zoo list | info NAME | verify [NAME]`: the models on the shelf."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_reason import zoo
from lit_reason.checkpoint.atomic import human
from lit_reason.errors import LitReasonError, ZooError
from lit_reason.zoo.manifest import read_index


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 when a model is unknown or damaged (one line on stderr, no traceback)."""
    options = _parser().parse_args(argv)
    shelf = Path(options.shelf) if options.shelf else zoo.default_shelf()
    console, errors = Console(), Console(stderr=True)
    try:
        return options.run(options, shelf, console, errors)
    except (LitReasonError, OSError) as error:
        _fail(errors, error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lit-reason-zoo", description="The pretrained models of lit_reason.")
    parser.add_argument("--shelf", help="another folder of models (default: the one that ships with the package)")
    commands = parser.add_subparsers(required=True, metavar="list | info | verify")
    commands.add_parser("list", help="every model, its size and metrics").set_defaults(run=_list)
    info = commands.add_parser("info", help="where a model comes from")
    info.add_argument("name", metavar="NAME", help="a name that `list` prints, or dir:PATH")
    info.set_defaults(run=_info)
    verify = commands.add_parser("verify", help="check sha256 of every file and recompute golden log-probs")
    verify.add_argument("name", metavar="NAME", nargs="?", help="default: every model")
    verify.set_defaults(run=_verify)
    return parser


def _list(options: argparse.Namespace, shelf: Path, console: Console, errors: Console) -> int:
    models = read_index(shelf)
    if not models:
        raise ZooError(f"the shelf {shelf} holds no models; give another one with --shelf DIR")
    table = Table(title=escape(str(shelf)))
    for column in ("name", "parameters", "dtype", "size", "metrics (95% interval)"):
        table.add_column(column, overflow="fold")
    for name, entry in sorted(models.items()):
        summary = entry["summary"]
        size = sum(file["size"] for file in entry["files"].values())
        metrics = [f"{k} {m['value']:.3f} ({m['ci'][0]:.3f}..{m['ci'][1]:.3f})" for k, m in summary["metrics"].items()]
        row = (name, f"{summary['params']:,}", summary["dtype"], human(size), "\n".join(metrics))
        table.add_row(*map(escape, row))
    console.print(table)
    return 0


def _info(options: argparse.Namespace, shelf: Path, console: Console, errors: Console) -> int:
    console.print_json(json.dumps(zoo.info(options.name, shelf)))
    return 0


def _verify(options: argparse.Namespace, shelf: Path, console: Console, errors: Console) -> int:
    names = [options.name] if options.name else zoo.list_models(shelf)
    if not names:
        raise ZooError(f"the shelf {shelf} holds no models; give another one with --shelf DIR")
    failed = 0
    for name in names:
        try:
            found = zoo.verify(name, shelf)
        except ZooError as error:
            _fail(errors, error)
            failed += 1
            continue
        gap = f"log-probs within {found.max_error:.1e} (tolerance {found.tolerance:.0e})"
        console.print(f"ok {name}: {found.files} files, {human(found.size)}, {gap}", markup=False, soft_wrap=True)
    return 1 if failed else 0


def _fail(errors: Console, error: Exception) -> None:
    errors.print(f"error: {error}", markup=False, soft_wrap=True, style="red")


if __name__ == "__main__":
    sys.exit(main())
