"""`lit-reason-zoo list | info NAME | verify [NAME]`: the models on the shelf; `count CONFIG`: what a shape costs;
`import FOLDER --to OUT | export NAME --to OUT`: from and to Hugging Face folders of the DeepSeek-V2 / V3 family."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import lit_reason
from lit_reason import zoo
from lit_reason.checkpoint.atomic import human
from lit_reason.config import instantiate
from lit_reason.data.chat import ChatTemplate, default_chat
from lit_reason.data.tokenizer import BYTE_FILE, ByteTokenizer, Tokenizer, load_tokenizer, save_for_transformers
from lit_reason.errors import ConfigError, DataError, LitReasonError, ZooError, nearest
from lit_reason.models import ModelConfig
from lit_reason.models.count import DTYPES, KV_DTYPES, OPTIMIZERS, Layout, count
from lit_reason.models.hf import load_hf, save_hf
from lit_reason.models.hf_config import from_hf_config
from lit_reason.zoo.manifest import FOLDER_PREFIX, locate, read_entry, read_index
from lit_reason.zoo.store import CODE_KEYS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", BYTE_FILE)
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUT = tuple(field.name for field in fields(Layout))


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
    commands = parser.add_subparsers(required=True, metavar="list | info | verify | count | import | export")
    commands.add_parser("list", help="every model, its size and metrics").set_defaults(run=_list)
    info = commands.add_parser("info", help="where a model comes from")
    info.add_argument("name", metavar="NAME", help="a name that `list` prints, or dir:PATH")
    info.set_defaults(run=_info)
    verify = commands.add_parser("verify", help="check sha256 of every file and recompute golden log-probs")
    verify.add_argument("name", metavar="NAME", nargs="?", help="default: every model")
    verify.set_defaults(run=_verify)
    _add_count(commands)
    _add_import_and_export(commands)
    return parser


def _add_count(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("count", help="parameters, FLOPs, KV cache and memory of a shape; no weights needed")
    known = "a name out of conf/model or of the shelf, a folder, or a config.json (ours or Hugging Face DeepSeek's)"
    command.add_argument("config", metavar="CONFIG", help=known)
    command.add_argument("--seq-len", type=int, metavar="T", help="tokens (default: 4096, or what the model takes)")
    command.add_argument("--mtp-layers", type=int, metavar="N", help="multi-token prediction (default: as configured)")
    command.add_argument("--dtype", default="bf16", help=f"of the weights: {', '.join(DTYPES)} (default: bf16)")
    command.add_argument(
        "--kv-dtype", metavar="DTYPE", help=f"of the KV cache: {', '.join(KV_DTYPES)} (default: the weights')"
    )
    command.add_argument(
        "--optimizer", default="adamw", help=f"{', '.join(OPTIMIZERS)} (default: adamw; none: inference)"
    )
    command.add_argument("--master-weights", action="store_true", help="fp32 copy, gradients and optimizer state")
    command.add_argument(
        "--layout", default="", metavar="KEY=N,...", help=f"{', '.join(LAYOUT)} (default: 1 rank, ZeRO-3)"
    )
    command.set_defaults(run=_count)


def _add_import_and_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("import", help="a Hugging Face folder (DeepSeek-V2/V3, Moonlight) -> a zoo folder")
    command.add_argument("folder", metavar="FOLDER", help="config.json, safetensors and the tokenizer's files")
    command.add_argument("--to", required=True, metavar="OUT", help="a new folder; load it as dir:OUT")
    command.add_argument("--tokenizer", metavar="NAME", help="'bytes', a folder or a hub name (default: FOLDER)")
    command.add_argument("--dtype", choices=sorted(FLOATS), help="of the parameters (default: FOLDER's)")
    command.set_defaults(run=_import)
    command = commands.add_parser("export", help="a zoo model -> a Hugging Face folder for transformers and vLLM")
    command.add_argument("name", metavar="NAME", help="a name that `list` prints, or dir:PATH")
    command.add_argument("--to", required=True, metavar="OUT", help="a new folder")
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default: 5)")
    command.set_defaults(run=_export)


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


def _count(options: argparse.Namespace, shelf: Path, console: Console, errors: Console) -> int:
    found = count(
        _model_config(options.config, shelf),
        seq_len=options.seq_len,
        mtp_layers=options.mtp_layers,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        optimizer=options.optimizer,
        master_weights=options.master_weights,
        layout=_layout(options.layout),
    )
    print(found.table())
    return 0


def _layout(text: str) -> Layout:
    """`"data=8,expert=4"` -> `Layout(data=8, expert=4)`."""
    degrees = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in LAYOUT:
            raise ConfigError(f"unknown key {name!r} in --layout {text}: {nearest(name, LAYOUT)}")
        if not value.isdecimal():
            raise ConfigError(f"--layout {part}; valid: a whole number, e.g. {name}=2")
        degrees[name] = int(value)
    return Layout(**degrees)


def _model_config(name: str, shelf: Path) -> ModelConfig:
    """The shape that a name out of conf/model, a name of the shelf, a folder or a config.json means, in this order."""
    shapes = {path.stem: path for path in (Path(lit_reason.__file__).parent / "conf" / "model").glob("*.yaml")}
    if name in shapes:
        return instantiate(OmegaConf.load(shapes[name]))
    models = read_index(shelf)
    if name in models:
        entry = locate(name, shelf)
        return _from_document(read_entry(entry)["config.json"], entry.folder / "config.json")
    path = Path(name.removeprefix(FOLDER_PREFIX))
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"no shape {name!r}, and no file {path}: {nearest(name, shapes.keys() | models)}")
    return _from_document(path.read_bytes(), path)


def _from_document(content: bytes, path: Path) -> ModelConfig:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if isinstance(document, dict) and "model_type" in document:
        return from_hf_config(document)
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ConfigError(f"{path} is no config.json of lit_reason ('model') or of Hugging Face ('model_type')")
    try:
        return ModelConfig.from_dict(document["model"])
    except TypeError as error:  # a text where a number belongs
        raise ConfigError(f"{path} does not describe a model: {error}") from error


def _import(options: argparse.Namespace, shelf: Path, console: Console, errors: Console) -> int:
    source = Path(options.folder)
    tokenizer = load_tokenizer(options.tokenizer or _tokenizer_folder(source))
    model = load_hf(source, FLOATS[options.dtype] if options.dtype else None)
    name = source.resolve().name
    info = {
        "recipe": f"lit-reason-zoo import {name}",
        "description": f"Weights of the Hugging Face folder {name}.",
        "seed": None,
        "commit": "imported",
        "metrics": {},
    }
    folder = zoo.save(Path(options.to), model, tokenizer, info)
    console.print(f"imported {source} to {folder}: load it as {FOLDER_PREFIX}{folder}", markup=False, soft_wrap=True)
    return 0


def _tokenizer_folder(source: Path) -> Path:
    """`source` if it holds a tokenizer that needs no code of its own."""
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            f"{source} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy its files there or type --tokenizer NAME"
        )
    config = source / "tokenizer_config.json"
    try:
        document = json.loads(config.read_bytes()) if config.is_file() else {}
    except ValueError as error:
        raise DataError(f"{config} is not JSON: {error}") from error
    if isinstance(document, dict) and (keys := CODE_KEYS & document.keys()):
        raise DataError(f"{config} holds {sorted(keys)}, which asks for code to be imported; type --tokenizer NAME")
    return source


def _export(options: argparse.Namespace, shelf: Path, console: Console, errors: Console) -> int:
    found = zoo.load(options.name, shelf)
    tokenizer = found.tokenizer
    stop = tokenizer.stop_ids
    special_tokens = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop[0] if len(stop) == 1 else list(stop),
        "pad_token_id": tokenizer.pad_id,
    }
    size = int(options.shard_gb * 1e9)
    chat = _chat(found.info["recipe"], tokenizer)
    folder = save_hf(
        found.model,
        options.to,
        max_shard_bytes=size,
        special_tokens=special_tokens,
        extra=lambda folder: save_for_transformers(tokenizer, folder, chat and chat.jinja()),
    )
    console.print(f"exported {options.name} to {folder}", markup=False, soft_wrap=True)
    return 0


def _chat(recipe: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that the model was trained with; None where only its tokenizer can know."""
    tree = OmegaConf.to_container(OmegaConf.create(recipe))
    if not isinstance(tree, dict) or not isinstance(data := tree.get("data"), dict):  # not a run of ours
        return default_chat(tokenizer) if isinstance(tokenizer, ByteTokenizer) else None
    chat = data.get("chat")
    return ChatTemplate(**{k: v for k, v in chat.items() if k != "_target_"}) if chat else default_chat(tokenizer)


def _fail(errors: Console, error: Exception) -> None:
    errors.print(f"error: {error}", markup=False, soft_wrap=True, style="red")


if __name__ == "__main__":
    sys.exit(main())
