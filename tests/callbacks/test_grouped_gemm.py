"""Experts as grouped products: ours, those of transformers, and a stranger's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lit_kernels.grouped import experts_reference
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_reason.callbacks import CompileModel, FP8Linear, FusedLogProb, GroupedGEMM
from lit_reason.callbacks.grouped_gemm import Call, Grouped
from lit_reason.errors import ConfigError
from lit_reason.models import ModelConfig, Transformer

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "num_local_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "olmoe": {"num_experts": 4},
}


def transformers_model(family, **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES | FAMILIES[family] | changes)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().train()


def gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_transformers_experts(family):
    model, ids = transformers_model(family), torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    loss, expected = gradients(copy.deepcopy(model), ids)
    report = GroupedGEMM().apply(model)
    assert report.changed and not report.declined
    found_loss, found = gradients(model, ids)
    torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("autocast", [False, True])
def test_ours(autocast):
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "width": 32, "depth": 3, "heads": 2, "experts": 4, "ffn_width": 64, "expert_width": 32}
    model, ids = Transformer(ModelConfig(**shape)), torch.randint(0, 40, (2, 12))

    def logits(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(ids)

    expected = logits(model)
    report = GroupedGEMM().apply(model)
    assert list(report.changed) == ["blocks.1.ffn.experts", "blocks.2.ffn.experts"]
    torch.testing.assert_close(logits(model), expected, **({"rtol": 0.05, "atol": 0.02} if autocast else {}))


class Experts(nn.Module):
    """A stranger's: other names, other argument order, another activation."""

    def __init__(self):
        super().__init__()
        self.w13, self.w2 = nn.Parameter(torch.randn(4, 16, 8)), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, index, weights, x):
        out = torch.zeros_like(x)
        for e in range(4):
            token, k = torch.where(index == e)
            gate, up = F.linear(x[token], self.w13[e]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.gelu(gate) * up, self.w2[e]) * weights[token, k, None])
        return out


def test_a_strangers_layout():
    torch.manual_seed(0)
    model, arguments = Experts().double(), (torch.randn(6, 4).topk(2).indices, torch.rand(6, 2).double())
    x = torch.randn(6, 8, dtype=torch.float64)
    expected = model(*arguments, x)
    assert not GroupedGEMM().apply(model).changed
    layout = lambda m, index, weights, x: Call(x, index, weights, m.w13, m.w2, F.gelu)  # noqa: E731
    callback = GroupedGEMM(layouts={Experts: layout})
    assert list(callback.apply(nn.ModuleDict({"moe": model})).changed) == ["moe"]
    assert isinstance(model, Grouped)
    torch.testing.assert_close(model(*arguments, x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(*arguments, x=x), expected, rtol=1e-12, atol=1e-12)


def test_what_is_declined_says_why():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 8)

    report = GroupedGEMM().apply(nn.ModuleDict({"experts": nn.ModuleList([Expert(), Expert()])}))
    assert report.declined == {"experts": "its weights are one tensor per expert; GroupedGEMM takes stacked ones"}
    gpt_oss = CONFIG_MAPPING["gpt_oss"](**SIZES, num_local_experts=4, head_dim=16)
    report = GroupedGEMM().apply(AutoModelForCausalLM.from_config(gpt_oss))
    assert not report.changed and all("biases" in why for why in report.declined.values()) and report.declined


def test_small_experts_keep_their_precision_and_say_so():
    model = transformers_model("mixtral")
    report = GroupedGEMM(precision="fp8", backend="emulate").apply(model)
    assert set(report.changed.values()) == {"grouped products, bf16, auto (48 x 32 is below min_features=2048)"}
    report = GroupedGEMM(precision="fp8", backend="emulate", min_features=0).apply(transformers_model("mixtral"))
    assert all("not" in what or "multiple" in what for what in report.changed.values())  # 24 is no multiple of 16
    model = transformers_model("mixtral", intermediate_size=32)
    report = GroupedGEMM(precision="fp8", backend="emulate", min_features=0).apply(model)
    assert set(report.changed.values()) == {"grouped products, fp8, emulate"}


@pytest.mark.parametrize("autocast", [False, True])
def test_fp8_changes_the_numbers_a_little(autocast):
    model, ids = transformers_model("mixtral", intermediate_size=32).float(), torch.arange(18).view(2, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, expected = gradients(copy.deepcopy(model), ids)
        GroupedGEMM(precision="fp8", backend="emulate", min_features=0).apply(model)
        found_loss, found = gradients(model, ids)
    assert 0 < abs(found_loss - loss) < 0.01 * loss
    name = "model.layers.0.mlp.experts.gate_up_proj"
    error = (found[name] - expected[name]).norm() / expected[name].norm()
    assert 0.001 < error < 0.15  # E4M3 keeps 3 bits of the operands' mantissas, and errors pass through two layers


def test_settings_that_do_not_exist():
    for settings, said in (
        ({"backend": "cuda"}, "backend='cuda'; valid: auto, torch, triton, emulate"),
        ({"precision": "int8"}, "precision='int8'; valid: bf16, fp8"),
        ({"scales": "ue8m0", "precision": "fp8"}, "scales='ue8m0'; valid: float, power of two"),
        ({"backend": "emulate"}, "without FP8 to emulate"),
    ):
        with pytest.raises(ConfigError, match=said):
            GroupedGEMM(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_layers_with_grouped_experts(dtype):
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "width": 32, "depth": 3, "heads": 2, "experts": 4, "ffn_width": 64, "expert_width": 32}
    # every expert is chosen: none can flip where the compiler rounds elsewhere
    model, ids = Transformer(ModelConfig(**shape, experts_per_token=4)), torch.randint(0, 40, (2, 12))

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(ids).float().logsumexp(-1).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    GroupedGEMM().apply(model)
    expected = gradients()
    CompileModel().apply(model)
    for name, gradient in gradients().items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.1), name


def test_an_activation_that_learns_is_seen_however_it_is_written():
    torch.manual_seed(0)
    model = Experts()
    model.beta = nn.Parameter(torch.ones(()))
    layout = lambda m, index, w, x: Call(x, index, w, m.w13, m.w2, lambda g: F.silu(m.beta * g))  # noqa: E731
    GroupedGEMM(layouts={Experts: layout}).apply(model)
    arguments = torch.randn(6, 8), torch.randn(6, 4).topk(2).indices, torch.rand(6, 2)
    model(*arguments[1:], arguments[0]).square().sum().backward()
    found, model.beta.grad = model.beta.grad, None
    experts_reference(*arguments, model.w13, model.w2, lambda g: F.silu(model.beta * g)).square().sum().backward()
    torch.testing.assert_close(found, model.beta.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("callback", [
    GroupedGEMM(backend="triton"), GroupedGEMM(precision="fp8"), FusedLogProb(backend="triton"),
    FP8Linear(backend="triton"),
], ids=lambda c: type(c).__name__)  # fmt: skip
def test_what_cannot_run_is_refused_in_setup(callback):
    with pytest.raises(ConfigError, match=rf"{type(callback).__name__}: .*Type backend="):
        callback.check(torch.device("cpu"))
