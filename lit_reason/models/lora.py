"""LoRA (2106.09685) and DoRA (2402.09353) by peft, put into a model that stays of its class: no wrapper.

    y = W x + alpha / rank * B A x        W frozen, A drawn at random, B = 0 at the start

Stacked experts get a B A each, A (E * rank, in) and B (out, rank * E), folded into their weights in every forward
pass; peft has neither DoRA nor dropout for them.

Generate with `merged_copy`, as `BuiltinEngine.push` does: latent attention decodes with `kv_b`'s weight itself.

Left out: GPT-2's transposed Conv1D, and several adapters at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_reason.errors import CheckpointError, ConfigError
from lit_reason.models.adapters import (
    adapted_layers,
    adapted_parameter,
    adapters,
    adapters_off,
    merged_copy,
    merged_weights,
    owner,
    plain_name,
)
from lit_reason.models.lora_targets import Matrix, choose, matrices, spellings

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = [
    "Declined",
    "LoRA",
    "LoRAReport",
    "adapters",
    "adapters_off",
    "add_lora",
    "load_adapters",
    "merged_copy",
    "merged_weights",
    "save_adapters",
]

_PREFIX = "base_model.model."
# What load_adapters takes over from a file, and what does not change the weights' meaning.
_READ = (
    "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules", "target_parameters",
    "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
)  # fmt: skip
_IGNORED = ("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
            "inference_mode", "runtime_config", "init_lora_weights")  # fmt: skip
_DRAWN = (True, False, "gaussian", "orthogonal", "eva")  # initialisations that leave the base's weights alone


@dataclass(frozen=True)
class LoRA:
    """What to adapt and how.

    Example::

        report = LoRA(rank=16).apply(model)

    Args:
        rank: of every B A.
        alpha: the update is alpha / rank * B A; None is 2 * rank.
        dora: DoRA, a learned norm per row on top.
        dropout: on A's input, in training.
        targets: names of linear maps, in full or their last parts ("kv_b", "blocks.0.attn.kv_b", "q_proj"), and
            "experts.gate_up", "experts.down". None is every linear map but embedding, head and router, and the stacked
            experts where peft can.

    Raises:
        ConfigError: when a value is out of range; in `apply`, when a target is unknown or cannot be adapted so.
    """

    rank: int = 16
    alpha: float | None = None
    dora: bool = False
    dropout: float = 0.0
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"adapter.rank={self.rank}: must be at least 1, e.g. adapter.rank=16")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"adapter.alpha={self.alpha}: must be above 0; null is 2 * rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout={self.dropout}: must be at least 0 and below 1")
        if isinstance(self.targets, str) or (self.targets is not None and not len(self.targets)):
            raise ConfigError(
                f"adapter.targets={self.targets!r}: must be a list of names or null, e.g. adapter.targets=[kv_b]"
            )

    def apply(self, model: nn.Module) -> LoRAReport:
        """`add_lora(model, self)`."""
        return add_lora(model, self)


class Declined(NamedTuple):
    """Number of parameters left as they are, and why."""

    parameters: int
    reason: str


@dataclass(frozen=True)
class LoRAReport:
    """What `add_lora` did, by the plain model's parameter names.

    Args:
        adapted: number of trainable parameters that adapt each.
        declined: every other matrix of the model.
        frozen: number of the base's parameters.
    """

    adapted: dict[str, int]
    declined: dict[str, Declined]
    frozen: int

    @property
    def trainable(self) -> int:
        return sum(self.adapted.values())

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} trainable parameters adapt {len(self.adapted)} matrices of a model of "
            f"{self.frozen:,}, frozen; {len(self.declined)} matrices have no adapter"
        )


def add_lora(model: nn.Module, lora: LoRA) -> LoRAReport:
    """Puts adapters into the model and freezes everything else. Its function stays the same until they train.

    A and B are float32 at least, whatever the base is in. A is drawn from torch's global generator: seed every rank
    alike.

    Args:
        model: any; of an adapter with an attribute `lm` that is a module, that.

    Raises:
        ConfigError: when the model has adapters, when a target is unknown or cannot be adapted so, when DoRA meets a
            row of zeros, whose norm it would divide by, and when peft adapted something else, which spoils the model.
    """
    from peft import LoraConfig

    _refuse_second(model)
    core, found = _core(model), matrices(_core(model))
    names = choose(found, lora.targets, dora=lora.dora, dropout=lora.dropout > 0)
    if lora.dora:
        _refuse_zero_rows(core, names)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        use_dora=lora.dora,
        lora_dropout=lora.dropout,
        target_modules=[name.removesuffix(".weight") for name in names if not found[name].stacked],
        target_parameters=[name for name in names if found[name].stacked] or None,
        task_type="CAUSAL_LM" if hasattr(core, "prepare_inputs_for_generation") else None,
    )
    _inject(model, config)
    if lora.dora:
        _take_norms(core)
    report = _report(core, found)
    _refuse_other_names(found, names, report)
    return report


def _refuse_zero_rows(core: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if not torch.linalg.vector_norm(core.get_parameter(name), dim=1).all():
            raise ConfigError(f"{name} has a row of zeros, whose norm DoRA divides by: type adapter.dora=false")


def _refuse_other_names(found: dict[str, Matrix], names: Sequence[str], report: LoRAReport) -> None:
    """peft takes a DeepSeek-V3's dense `gate_proj`, `up_proj` and `down_proj` for its routed experts'."""
    if wrong := sorted(set(names) ^ set(report.adapted)):
        right = sorted({spellings(name, found[name].stacked)[0] for name in names if name in report.adapted})
        raise ConfigError(
            f"peft takes the targets for others than these: {', '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}. "
            f"Load the model anew and type adapter.targets=[{','.join(right)}]"
        )


def _refuse_second(model: nn.Module) -> None:
    if adapters(model):
        raise ConfigError("the model has adapters already: go on with them, or take merged_copy(model)")


def _core(model: nn.Module) -> nn.Module:
    """The model whose names strangers know: of an adapter of another library's model, that model."""
    inner = getattr(model, "lm", None)
    return inner if isinstance(inner, nn.Module) else model


def _inject(model: nn.Module, config: LoraConfig) -> None:
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    model.requires_grad_(False)
    inject_adapter_in_model(config, _core(model))
    cast_adapter_dtype(model, "default")


@torch.no_grad()
def _take_norms(core: nn.Module) -> None:
    """DoRA's magnitudes in the adapters' precision: peft takes them in the base's, and one in bfloat16 would compute
    something else from the start."""
    for layer in adapted_layers(core).values():
        module, name = adapted_parameter(layer)
        magnitude = layer.get_submodule("lora_magnitude_vector.default").get_parameter("weight")
        magnitude.copy_(torch.linalg.vector_norm(module.get_parameter(name).to(magnitude.dtype), dim=1))


def _report(core: nn.Module, found: dict[str, Matrix]) -> LoRAReport:
    """Reads off the model what has adapters."""
    layers = adapted_layers(core)
    count = dict.fromkeys(layers, 0)
    for name, parameter in core.named_parameters():
        if layer := owner(name, layers):
            count[layer] += parameter.numel()
    adapted = {plain_name(f"{name}.{adapted_parameter(layer)[1]}"): count[name] for name, layer in layers.items()}
    config: LoraConfig = core.peft_config["default"]  # type: ignore[index]
    kind = config.use_dora, config.lora_dropout > 0
    declined = {
        name: Declined(matrix.parameters, matrix.cannot(*kind) or "not among the targets")
        for name, matrix in found.items()
        if name not in adapted
    }
    return LoRAReport(adapted, declined, sum(p.numel() for p in core.parameters()) - sum(count.values()))


def save_adapters(model: nn.Module, folder: str | Path, base: str) -> None:
    """Writes the adapters in peft's format, for `peft.PeftModel.from_pretrained(base_model, folder)`.

    Args:
        folder: gets `adapter_model.safetensors` and `adapter_config.json`.
        base: name or path of the base model, for whoever reads the config.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    core, folder = _core(model), Path(folder)
    if not adapters(model):
        raise ConfigError("the model has no adapters to save: add_lora(model, LoRA()) puts them in")
    config: LoraConfig = core.peft_config["default"]  # type: ignore[index]
    # With embeddings "auto", peft asks the Hub for the base's config.json.
    state: dict[str, Tensor] = get_peft_model_state_dict(core, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = replace(config, base_model_name_or_path=base, inference_mode=True)
    # As lists, which its constructor makes sets, or they would be written in another order each time.
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules or [])
    config.target_parameters = sorted(config.target_parameters or []) or None
    config.save_pretrained(str(folder))


def load_adapters(model: nn.Module, folder: str | Path) -> LoRAReport:
    """Puts the adapters of a folder in peft's format into the model, ready to train on.

    Raises:
        ConfigError: when the model has adapters.
        CheckpointError: when the folder lacks a file, its config asks for more than LoRA or DoRA, or the tensors do not
            fit the model; in the last case the model is spoiled.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(folder)
    _refuse_second(model)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} has no {file}: give a folder that save_adapters or peft wrote")
    core, found = _core(model), matrices(_core(model))
    values = _read_config(folder / "adapter_config.json")
    try:
        _inject(model, LoraConfig(**values))
        loaded = set_peft_model_state_dict(core, load_file(folder / "adapter_model.safetensors"))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"the adapters of {folder} do not fit the model: {error}") from error
    wrong = [name for name in loaded.missing_keys if ".lora_" in name] + loaded.unexpected_keys
    if wrong:
        raise CheckpointError(f"the adapters of {folder} do not fit the model: {', '.join(sorted(wrong)[:4])}")
    return _report(core, found)


def _read_config(path: Path) -> dict[str, Any]:
    """The arguments of peft's LoraConfig that a file sets, if it is plain LoRA or DoRA."""
    from peft import LoraConfig

    values, plain = json.loads(path.read_text(encoding="utf-8")), LoraConfig()
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {values.get('peft_type')!r}; valid: 'LORA'")
    other = {name: v for name, v in values.items() if name not in _READ + _IGNORED and v != getattr(plain, name, None)}
    if values.get("init_lora_weights", True) not in _DRAWN:  # it moved a part of the base's weights into B A
        other["init_lora_weights"] = values["init_lora_weights"]
    if other:
        raise CheckpointError(
            f"{path}: cannot read adapters with {other}; valid is plain LoRA or DoRA. Load them with "
            "peft.PeftModel.from_pretrained and start from what its merge_and_unload() returns"
        )
    return {name: values[name] for name in _READ if name in values}
