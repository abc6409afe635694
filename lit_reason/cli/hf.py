"""What the stages do with a model of transformers: start from it, hold its tokenizer against the data's, save it.

model=hf model.name=PATH data.tokenizer=PATH  ->  RUN/<stage>/model/  config.json  *.safetensors  tokenizer  info.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_reason.checkpoint.atomic import to_json
from lit_reason.data import PromptData, Tokenizer
from lit_reason.data.tokenizer import BYTE_FILE, load_tokenizer, save_for_transformers
from lit_reason.errors import ConfigError, DataError
from lit_reason.models import HFConfig, HFModel
from lit_reason.zoo.manifest import FOLDER_PREFIX

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", BYTE_FILE)
PROBE = "User: What is 12 + 345 - 6?\nAssistant: <think>12+345=357\n\n357-6=351</think> Größe, naïve; 数 \t{x_1: 'ok'}"


def start_hf(config: HFConfig, tokenizer: Tokenizer, weights: Path | None) -> HFModel:
    """The model of `weights`, what the stage before left, else of `model.name`; the tokenizer must be its own."""
    if weights is not None:
        config = replace(config, name=str(weights))
    check_tokenizer(config.name, tokenizer)
    model = config.build()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"data.tokenizer has {tokenizer.vocab_size} ids, the model {config.name} {model.config.vocab_size}: type "
            "data.tokenizer=PATH of the tokenizer that the model was trained with"
        )
    return model


def check_tokenizer(name: str, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that gives other ids than the one beside the model, if there is one."""
    own = _own_tokenizer(name)
    if own is not None and (own.encode(PROBE), own.stop_ids) != (tokenizer.encode(PROBE), tokenizer.stop_ids):
        raise DataError(
            f"data.tokenizer gives other ids than the tokenizer of model.name={name}: to the model they mean something "
            f"else. Type data.tokenizer={name}"
        )


def _own_tokenizer(name: str) -> Tokenizer | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return load_tokenizer(folder) if any((folder / file).is_file() for file in TOKENIZER_FILES) else None
    try:
        return load_tokenizer(name)
    except DataError:  # a hub repository without a tokenizer
        return None


def save_hf_policy(path: Path, model: HFModel, data: PromptData, info: Mapping[str, Any]) -> Path:
    """The finished stage as a folder of transformers, its tokenizer and chat template beside it. Replaces `path`."""

    def beside(folder: Path) -> None:
        save_for_transformers(data.tokenizer, folder, data.chat.jinja())
        (folder / "info.json").write_bytes(to_json(info))

    shutil.rmtree(path, ignore_errors=True)  # an earlier attempt's; the checkpoint from which this one comes is there
    path.parent.mkdir(parents=True, exist_ok=True)
    return model.save(path, extra=beside)


def hf_folder(name: str | Path) -> Path | None:
    """The folder that `dir:PATH` or a Path means, if transformers wrote it."""
    if isinstance(name, str) and not name.startswith(FOLDER_PREFIX):
        return None
    folder = Path(str(name).removeprefix(FOLDER_PREFIX)).expanduser()
    try:
        return folder if "model_type" in json.loads((folder / "config.json").read_bytes()) else None
    except (OSError, ValueError):
        return None
