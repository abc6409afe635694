"""Compares our model with transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM, in float32 on random weights.

    python scripts/hf_parity.py                        12 small configs, one line each
    python scripts/hf_parity.py --config config.json   one of your own (a file, or the JSON itself); keep it small
    python scripts/hf_parity.py --mtp FILE             multi-token prediction, which transformers has from 5.23 on:
                                                       worst |our logits - theirs| per depth; FILE gets theirs (a test
                                                       reads them from tests/golden/mtp.json)

Of every config:

    import   their folder in our model:                  worst |our logits - theirs|, at most 1e-5
    export   that model written, read by from_pretrained: worst |their logits - theirs|, at most 1e-6
    muP      the same weights under a base of depth 1, written: worst |our logits - theirs|, at most 1e-5
    greedy   tokens of `generate` and of BuiltinEngine, of which all must agree

Exit code 1 when a limit is exceeded."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_reason.data import ByteTokenizer
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.models.hf import load_hf, save_hf
from lit_reason.rollout.builtin import BuiltinEngine
from lit_reason.rollout.sampling import Sampling
from lit_reason.types import Prompt

IMPORT_LIMIT, EXPORT_LIMIT = 1e-5, 1e-6
# Their reference paths: sdpa alone moves logits by 3e-6, and grouped_mm refuses widths that are no multiple of 4.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
V2 = V3 | {"model_type": "deepseek_v2", "topk_method": "greedy", "norm_topk_prob": False}
GROUPS = {"n_group": 4, "topk_group": 2}
ODD = {"kv_lora_rank": 13, "v_head_dim": 7, "qk_nope_head_dim": 5, "intermediate_size": 37, "moe_intermediate_size": 11}
CASES: dict[str, dict[str, Any]] = {
    "v3, direct queries": V3,
    "v3, query latent, 4 groups, 2 shared": V3
    | GROUPS
    | {"q_lora_rank": 24, "n_shared_experts": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5},
    "v3, no dense layer, YaRN": V3 | {"first_k_dense_replace": 0, "rope_parameters": YARN},
    "v3, 3 dense layers, 4 groups, YaRN with mscale != mscale_all_dim": V3
    | GROUPS
    | {"num_hidden_layers": 4, "first_k_dense_replace": 3, "rope_parameters": YARN | {"mscale_all_dim": 0.707}},
    "v3, odd ranks, YaRN": V3 | ODD | {"q_lora_rank": 17, "vocab_size": 51, "rope_parameters": YARN},
    "v3, rotary halves, query latent, YaRN": V3
    | {"q_lora_rank": 24, "rope_interleave": False, "rope_parameters": YARN},
    "v3, rotary halves, direct queries, 2 shared": V3 | {"rope_interleave": False, "n_shared_experts": 2},
    "v3, Moonlight's: eps 1e-5, theta 5e4, 2 shared": V3
    | {"rms_norm_eps": 1e-5, "rope_theta": 5e4, "n_shared_experts": 2, "routed_scaling_factor": 2.446},
    "v3, weights not normalised, 4 groups": V3 | GROUPS | {"norm_topk_prob": False, "q_lora_rank": 24},
    "v2, V2-Lite's: greedy, 2 shared, YaRN .707": V2
    | {"n_shared_experts": 2, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "v2, V2's: 4 groups by their best, scale 16, YaRN": V2
    | GROUPS
    | {
        "topk_method": "group_limited_greedy",
        "q_lora_rank": 24,
        "routed_scaling_factor": 16.0,
        "rope_parameters": YARN,
    },
    # transformers 5.19's V2 rotates views as complex numbers, which fails for odd nope dims and key/value ranks
    "v2, odd ranks, no dense layer": V2
    | ODD
    | {"q_lora_rank": 15, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "first_k_dense_replace": 0},
}


@dataclass(frozen=True, slots=True)
class Parity:
    """Worst absolute logit differences and how many greedy tokens differ (see above)."""

    imported: float
    exported: float
    folded: float
    tokens: int
    tokens_differing: int

    @property
    def ok(self) -> bool:
        within = max(self.imported, self.folded) <= IMPORT_LIMIT and self.exported <= EXPORT_LIMIT  # False for NaN
        return within and self.tokens_differing == 0


@torch.no_grad()
def compare(values: Mapping[str, Any], seed: int = 0, rows: int = 2, tokens: int = 40, new_tokens: int = 12) -> Parity:
    """Builds their model of config.json `values`, and carries it through our code."""
    torch.manual_seed(seed)
    theirs = their_model(values)
    ids_BT = torch.randint(0, values["vocab_size"], (rows, tokens))
    expected_BTV = theirs(ids_BT).logits
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs.save_pretrained(folder / "theirs")
        ours = load_hf(folder / "theirs").eval()
        again = from_pretrained(save_hf(ours, folder / "ours", max_shard_bytes=20_000))
        scaled = with_base_depth_1(ours)
        folded = from_pretrained(save_hf(scaled, folder / "folded"))
    short_BT = ids_BT[:, :9]
    got_BT = our_greedy(ours, short_BT, new_tokens)
    return Parity(
        imported=worst(ours(ids_BT), expected_BTV),
        exported=worst(again(ids_BT).logits, expected_BTV),
        folded=worst(scaled(ids_BT), folded(ids_BT).logits),
        tokens=got_BT.numel(),
        tokens_differing=int((got_BT != their_greedy(theirs, short_BT, new_tokens)).sum()),
    )


def their_model(values: Mapping[str, Any]) -> PreTrainedModel:
    """Random weights of a size that makes logits of order 1 and routing that is not flat; biases as well."""
    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, **EAGER).eval()
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(std=1.0 if "embed" in name else 1 / math.sqrt(tensor.shape[-1]))
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.2)
    return model


def from_pretrained(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **EAGER).eval()


def with_base_depth_1(model: Transformer) -> Transformer:
    """The same weights, every residual branch times 1 / depth."""
    base = Base(width=model.config.width, depth=1)
    scaled = Transformer(replace(model.config, base=base)).eval()
    scaled.load_state_dict(model.state_dict())
    return scaled


def our_greedy(model: Transformer, ids_BT: Tensor, new_tokens: int) -> Tensor:
    engine = BuiltinEngine(ByteTokenizer(), dtype="float32")
    engine.push(model, version=0)
    prompts = [Prompt(str(i), "", "", "parity", tuple(row)) for i, row in enumerate(ids_BT.tolist())]
    sampling = Sampling(temperature=0.0, max_tokens=new_tokens)
    return torch.tensor([c.token_ids for c in engine.generate(prompts, sampling, seeds=range(len(prompts)))])


def their_greedy(model: Any, ids_BT: Tensor, new_tokens: int) -> Tensor:
    mask = torch.ones_like(ids_BT)
    out = model.generate(ids_BT, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return out[:, ids_BT.shape[1] :]


def mtp_model() -> Transformer:
    """Two modules of multi-token prediction, muP multipliers that are not 1, and weights by a formula."""
    config = ModelConfig(
        vocab_size=24, width=32, depth=3, heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, ffn_width=48, experts=8, expert_width=16, max_seq_len=64, mtp_depth=2,
        base=Base(width=32, depth=2),
    )  # fmt: skip
    model = Transformer(config).eval()
    with torch.no_grad():
        for i, tensor in enumerate((*model.parameters(), *(router.bias_E for router in model.routers()))):
            n = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
            noise = ((n * 12.9898 + i).sin() * 43758.5453 % 1 - 0.5) * 12**0.5  # variance 1
            gain = tensor.dim() == 1 and tensor.requires_grad
            tensor.copy_(1 + 0.3 * noise if gain else noise / tensor.shape[-1] ** 0.5)
    return model


def mtp_ids() -> Tensor:
    """int64 (2, 12)."""
    return (torch.arange(24) * 7 % 24).view(2, 12)


@torch.no_grad()
def our_mtp(model: Transformer, ids_BT: Tensor) -> list[Tensor]:
    """Logits of each depth, (B, T - depth, V)."""
    hidden = model.hidden(ids_BT[:, :-1])
    further = model.further(hidden, ids_BT[:, 1:])
    return [model.head(h.states_BTD)[:, : ids_BT.shape[1] - k] for k, h in enumerate(further, start=1)]


@torch.no_grad()
def their_mtp(model: Transformer, ids_BT: Tensor) -> list[Tensor]:
    """The same by transformers, which reads the model from the folder that we write."""
    from transformers.modeling_layers import MtpModel  # from 5.23 on

    with tempfile.TemporaryDirectory() as name:
        trunk: Any = from_pretrained(save_hf(model, Path(name) / "ours"))
        # Theirs takes for a prediction layer what the trunk ignores: layer 61, DeepSeek-V3's, in their code.
        depths = range(model.config.depth, model.config.depth + model.config.mtp_depth)
        trunk._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{depth}\..*" for depth in depths]
        modules: Any = MtpModel.from_pretrained(trunk).eval()
        states = trunk(ids_BT[:, :-1], output_hidden_states=True).hidden_states[-1]
        found = []
        for k in range(model.config.mtp_depth):
            inputs = ids_BT[:, 1 + k :]
            T = inputs.shape[1]
            positions = torch.arange(1 + k, 1 + k + T)[None]
            states = modules.forward_layer(k, states[:, :T], positions, None, input_ids=inputs)
            found.append(trunk.lm_head(states))
    return found


def compare_mtp(file: Path) -> int:
    model, ids_BT = mtp_model(), mtp_ids()
    theirs = their_mtp(model, ids_BT)
    errors = [worst(a, b) for a, b in zip(our_mtp(model, ids_BT), theirs, strict=True)]
    print("multi-token prediction, depth 1, 2: " + ", ".join(f"{error:.1e}" for error in errors))
    record = {"transformers": transformers.__version__, "logits": [logits_BTV.tolist() for logits_BTV in theirs]}
    file.write_text(json.dumps(record) + "\n")
    return 0 if max(errors) <= IMPORT_LIMIT else 1


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", metavar="JSON", help="a config.json, or its content")
    parser.add_argument("--mtp", type=Path, metavar="FILE", help="multi-token prediction instead; FILE gets theirs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.mtp:
        return compare_mtp(options.mtp)
    cases = CASES if options.config is None else {"given": _read(options.config)}
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32, seed {options.seed}")
    print(f"{'import':>8} {'export':>8} {'muP':>8}  greedy  config")
    found = []
    for name, values in cases.items():
        parity = compare(values, options.seed)
        found.append(parity)
        errors = f"{parity.imported:8.1e} {parity.exported:8.1e} {parity.folded:8.1e}"
        greedy = f"{parity.tokens - parity.tokens_differing}/{parity.tokens}"
        print(f"{errors} {greedy:>7}  {name}{'' if parity.ok else '   TOO FAR'}", flush=True)
    print(f"worst: import {max(p.imported for p in found):.1e} (limit {IMPORT_LIMIT:.0e}), "
          f"export {max(p.exported for p in found):.1e} (limit {EXPORT_LIMIT:.0e}), "
          f"muP {max(p.folded for p in found):.1e}")  # fmt: skip
    return 0 if all(p.ok for p in found) else 1


def _read(config: str) -> dict[str, Any]:
    text = config if config.lstrip().startswith("{") else Path(config).read_text()
    return V3 | json.loads(text)


if __name__ == "__main__":
    sys.exit(main())
