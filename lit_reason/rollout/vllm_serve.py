"""The command that starts a server for `rollout=vllm_server`: `python -m lit_reason.rollout.vllm_serve FOLDER`.

FOLDER holds config.json and, if the server is to answer before the first push, the weights: what
`lit-reason-zoo export` and `lit_reason.models.hf.save_hf` write. Prints one line for a shell and starts nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lit_reason.errors import ConfigError, nearest
from lit_reason.rollout.hosted import DTYPES
from lit_reason.rollout.vllm import environment, llm_settings, runs_latent

EXTENSION = "lit_reason.rollout.vllm_extension.WorkerExtension"
# What transformers leaves out of config.json and vLLM then guesses otherwise, without a word.
ROUTING = {"deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}


def serve_command(
    folder: str | Path,
    *,
    port: int = 8000,
    host: str = "127.0.0.1",
    dtype: str = "bfloat16",
    device: str | None = None,
    max_rows: int = 256,
    kv_cache_mb: int | None = None,
    gpu_memory: float = 0.9,
    threads: int = 1,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """(arguments, variables) of a server for the model in `folder`, for `subprocess.Popen(arguments, env=...)`.

    Args:
        host: whom it listens to. Trap: whoever reaches the port can change its weights; keep it off open networks.
        device: "cpu", "cuda" or "cuda:1"; None: what this machine has.
        max_rows, kv_cache_mb, gpu_memory, threads: as of `VLLMEngine`; 256 MiB of keys and values on a CPU.
        options: further options of `vllm serve`, e.g. {"enable_expert_parallel": True}.

    Raises:
        ConfigError: no config.json, no such dtype or device, or vLLM cannot run this model.
    """
    folder = Path(folder).absolute()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json. Type: lit-reason-zoo export NAME --to {folder}")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: {nearest(dtype, DTYPES)}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device or "cpu"):
        raise ConfigError(f"--device {device}: valid cpu, cuda, or one of several: cuda:1")
    config = json.loads((folder / "config.json").read_text())
    at = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    latent = runs_latent(config, at)
    settings = llm_settings(
        config,
        at,
        dtype=dtype,
        latent=latent,
        experts=bool(config.get("n_routed_experts")),
        max_rows=max_rows,
        kv_cache_mb=kv_cache_mb,
        gpu_memory=gpu_memory,
    )
    settings |= {
        "host": host,
        "port": port,
        "skip_tokenizer_init": True,
        "worker_extension_cls": EXTENSION,
        "enable_scale_out": True,  # /inference/v1/generate: token ids in and out
        "enable_prompt_tokens_details": True,  # how many of them came from the cache
        "disable_uvicorn_access_log": True,
    }
    del settings["disable_log_stats"]  # its counters are the server's sign of life
    if not any(folder.glob("*.safetensors")):
        settings["load_format"] = "dummy"
    if missing := {k: v for k, v in ROUTING.get(config["model_type"], {}).items() if not config.get(k)}:
        settings["hf_overrides"] = missing
    variables = environment(at, latent, threads) | {"VLLM_SERVER_DEV_MODE": "1"}
    if at.type == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every server of a machine takes the same cores
        settings["distributed_executor_backend"] = "uni"  # one process and its start-up less
    else:
        del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return [*_program(), "--model", str(folder), *_flags(settings | dict(options or {}))], variables


def _program() -> list[str]:
    """`vllm serve`; vLLM's CPU build lacks it, since it looks for a package of the other name."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return ["vllm", "serve"]


def _flags(settings: Mapping[str, Any]) -> list[str]:
    found = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            found += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lit_reason.rollout.vllm_serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are those of `serve_command`
    )
    add = parser.add_argument
    add("folder", help="the model: config.json, weights if any")
    add("--port", type=int, help="one per server (8000)")
    add("--host", help="whom it listens to: whoever reaches the port can change its weights (127.0.0.1)")
    add("--dtype", choices=DTYPES, help="what it computes in (bfloat16)")
    add("--device", metavar="{cpu,cuda,cuda:N}", help="what it runs on (what this machine has)")
    add("--max-rows", type=int, help="sequences at a time (256)")
    add("--kv-cache-mb", type=int, help="MiB of keys and values (256 on a CPU; on a GPU: by --gpu-memory)")
    add("--gpu-memory", type=float, help="share of the GPU's memory that it takes (0.9)")
    add("--threads", type=int, help="of a CPU's arithmetic (1)")
    try:
        argv, variables = serve_command(**vars(parser.parse_args(arguments)))
    except ConfigError as error:
        parser.error(str(error))
    print(" ".join([*(f"{key}={shlex.quote(value)}" for key, value in variables.items()), shlex.join(argv)]))


if __name__ == "__main__":
    main()
