"""Logits equal transformers' DeepseekV3ForCausalLM with the same weights."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from lit_reason.models import Base, ModelConfig, Transformer, Yarn

SHARED = {
    "vocab_size": 50,
    "width": 32,
    "depth": 3,
    "heads": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
CASES = {
    "direct queries, no groups": ModelConfig(
        **SHARED, kv_lora_rank=16, ffn_width=48, experts=4, experts_per_token=2, expert_width=16, base=Base(32, 3)
    ),
    "query latent, groups, scale": ModelConfig(
        **SHARED, q_lora_rank=24, kv_lora_rank=12, ffn_width=40, experts=8, experts_per_token=3, expert_width=12,
        shared_experts=2, expert_groups=4, groups_per_token=2, routed_scale=2.5, base=Base(32, 3),
    ),
    "yarn, all experts": ModelConfig(
        **SHARED, q_lora_rank=8, kv_lora_rank=8, ffn_width=40, first_dense=0, experts=6, experts_per_token=2,
        expert_width=12, expert_groups=3, groups_per_token=2, routed_scale=1.7, base=Base(32, 3),
        yarn=Yarn(factor=40.0, original_max_seq_len=16, mscale=1.0, mscale_all_dim=0.707),
    ),
}  # fmt: skip


def their_config(config: ModelConfig) -> DeepseekV3Config:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (yarn := config.yarn) is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_seq_len,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        moe_intermediate_size=config.expert_width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        n_shared_experts=config.shared_experts,
        n_routed_experts=config.experts,
        routed_scaling_factor=config.routed_scale,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=config.q_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        n_group=config.expert_groups,
        topk_group=config.groups_per_token,
        num_experts_per_tok=config.experts_per_token,
        first_k_dense_replace=config.first_dense,
        norm_topk_prob=True,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,  # 1e-6: the latents' norms there have it whatever this says
        rope_parameters=rope,
        rope_interleave=True,
        num_nextn_predict_layers=0,
        attn_implementation="eager",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def their_weights(ours: Transformer) -> dict[str, torch.Tensor]:
    """Our parameters under their names."""
    out = {
        "model.embed_tokens.weight": ours.embed.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.head.weight,
    }
    for i, block in enumerate(ours.blocks):
        at, attn = f"model.layers.{i}.", block.attn
        out[at + "input_layernorm.weight"] = block.attn_norm.weight
        out[at + "post_attention_layernorm.weight"] = block.ffn_norm.weight
        if ours.config.q_lora_rank is None:
            out[at + "self_attn.q_proj.weight"] = attn.q.weight
        else:
            names = ("q_a_proj", "q_a_layernorm", "q_b_proj")
            out |= {f"{at}self_attn.{n}.weight": layer.weight for n, layer in zip(names, attn.q, strict=True)}
        out[at + "self_attn.kv_a_proj_with_mqa.weight"] = attn.kv_a.weight
        out[at + "self_attn.kv_a_layernorm.weight"] = attn.kv_norm.weight
        out[at + "self_attn.kv_b_proj.weight"] = attn.kv_b.weight
        out[at + "self_attn.o_proj.weight"] = attn.out.weight
        if i < ours.config.first_dense:
            out |= swiglu(block.ffn, at + "mlp.")
        else:
            out[at + "mlp.gate.weight"] = block.ffn.router.weight
            out[at + "mlp.gate.e_score_correction_bias"] = block.ffn.router.bias_E
            out[at + "mlp.experts.gate_up_proj"] = block.ffn.experts.gate_up
            out[at + "mlp.experts.down_proj"] = block.ffn.experts.down
            out |= swiglu(block.ffn.shared, at + "mlp.shared_experts.")
    return out


def swiglu(layer, at: str) -> dict[str, torch.Tensor]:
    gate, up = layer.gate_up.weight.chunk(2)
    return {at + "gate_proj.weight": gate, at + "up_proj.weight": up, at + "down_proj.weight": layer.down.weight}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_deepseek_v3(case):
    torch.manual_seed(3)
    ours = Transformer(CASES[case]).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
    for router in ours.routers():
        router.bias_E.normal_(std=0.5)  # also negative ones: they must not let a dropped group win
    theirs = DeepseekV3ForCausalLM(their_config(CASES[case])).eval()
    theirs.load_state_dict(their_weights(ours), strict=True)
    ids = torch.randint(0, 50, (3, 40))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)
