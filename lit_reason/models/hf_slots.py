"""Where each tensor of a DeepSeek-V2 / V3 checkpoint lives in our model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lit_reason.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Slot:
    """A checkpoint tensor's place in ours: rows `start:stop` of `name`, or of its expert `expert`.

    `folded`: the checkpoint holds it times the residual multiplier. `repeated`: another tensor has this place too, and
    this one must equal it, if it is there at all.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    expert: int | None = None
    folded: bool = False
    repeated: bool = False

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        tensor = tensors[self.name]
        return (tensor if self.expert is None else tensor[self.expert])[self.start : self.stop]


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Their name -> our place, for every parameter and every router's bias."""
    out = {
        "model.embed_tokens.weight": Slot("embed.weight"),
        "model.norm.weight": Slot("norm.weight"),
        "lm_head.weight": Slot("head.weight"),
    }
    attention, dense = _attention_slots(config), _swiglu_slots("mlp.", "ffn.", config.ffn_width)
    moe = _moe_slots(config)
    for i in range(config.depth):
        for name, slot in (attention | (dense if i < config.first_dense else moe)).items():
            out[f"model.layers.{i}.{name}"] = replace(slot, name=f"blocks.{i}.{slot.name}")
    for k in range(config.mtp_depth):  # numbered on after the trunk; they repeat the embedding and the head
        layer = f"model.layers.{config.depth + k}."
        for name, slot in (attention | (moe if config.moe_layers else dense)).items():
            out[layer + name] = replace(slot, name=f"mtp.{k}.block.{slot.name}", folded=False)
        for theirs, ours in {
            "enorm": "enorm",
            "hnorm": "hnorm",
            "eh_proj": "eh_proj",
            "shared_head.norm": "norm",
        }.items():
            out[f"{layer}{theirs}.weight"] = Slot(f"mtp.{k}.{ours}.weight")
        out[f"{layer}embed_tokens.weight"] = Slot("embed.weight", repeated=True)
        out[f"{layer}shared_head.head.weight"] = Slot("head.weight", repeated=True)
    return out


def _attention_slots(config: ModelConfig) -> dict[str, Slot]:
    query = (
        {"q_proj": "q"}
        if config.q_lora_rank is None
        else {"q_a_proj": "q.0", "q_a_layernorm": "q.1", "q_b_proj": "q.2"}
    )
    names = query | {"kv_a_proj_with_mqa": "kv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_b"}
    return {
        "input_layernorm.weight": Slot("attn_norm.weight"),
        "post_attention_layernorm.weight": Slot("ffn_norm.weight"),
        "self_attn.o_proj.weight": Slot("attn.out.weight", folded=True),
        **{f"self_attn.{theirs}.weight": Slot(f"attn.{ours}.weight") for theirs, ours in names.items()},
    }


def _swiglu_slots(
    theirs: str, ours: str, hidden: int, expert: int | None = None, suffix: str = ".weight"
) -> dict[str, Slot]:
    return {
        f"{theirs}gate_proj.weight": Slot(f"{ours}gate_up{suffix}", stop=hidden, expert=expert),
        f"{theirs}up_proj.weight": Slot(f"{ours}gate_up{suffix}", start=hidden, expert=expert),
        f"{theirs}down_proj.weight": Slot(f"{ours}down{suffix}", expert=expert, folded=True),
    }


def _moe_slots(config: ModelConfig) -> dict[str, Slot]:
    out = {"mlp.gate.weight": Slot("ffn.router.weight")}
    if config.scoring == "sigmoid":
        out["mlp.gate.e_score_correction_bias"] = Slot("ffn.router.bias_E")
    for e in range(config.experts):
        out |= _swiglu_slots(f"mlp.experts.{e}.", "ffn.experts.", config.expert_width, e, suffix="")
    if config.shared_experts:
        hidden = config.shared_experts * config.expert_width
        out |= _swiglu_slots("mlp.shared_experts.", "ffn.shared.", hidden)
    return out
