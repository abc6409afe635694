"""Adapters against the plain model that they fold into, against peft's own loader, and their roles at two widths."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_reason.config.instantiate import instantiate
from lit_reason.data.tokenizer import ByteTokenizer
from lit_reason.errors import CheckpointError, ConfigError
from lit_reason.models import Base, ModelConfig, Transformer, parameter_roles
from lit_reason.models.checksum import base_checksum, checksum
from lit_reason.models.lora import (
    LoRA,
    adapters,
    adapters_off,
    add_lora,
    load_adapters,
    merged_copy,
    merged_weights,
    save_adapters,
)
from lit_reason.optim import parameter_groups
from lit_reason.optim.adamw import AdamW
from lit_reason.optim.muon import Muon
from lit_reason.rollout import BuiltinEngine, Sampling
from lit_reason.types import Prompt

transformers = pytest.importorskip("transformers")
IDS = torch.arange(24).view(2, 12) % 40
DOUBLE = {"rtol": 0, "atol": 1e-10}


class Wrapped(nn.Module):
    """What an adapter of another library's model looks like from here."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids):
        return self.lm(ids).logits


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def disturb(model, seed=1, scale=0.3):
    """Random B and, in DoRA, magnitudes away from the norms they start at."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if ".lora_B." in name:
                parameter.copy_(noise)
            elif ".lora_magnitude_vector." in name:
                parameter.mul_(1 + noise)
    return model


def distance(a, b):
    return (a - b).abs().max().item()


@pytest.fixture
def ours(tiny):
    """A model of ours with every kind of layer: compressed queries, shared experts, multi-token prediction."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return Transformer(tiny(q_lora_rank=16, shared_experts=1, mtp_depth=1, **changes)).eval()

    return make


def makers(ours):
    return {"ours": ours, "llama": lambda: Wrapped(llama())}


KINDS = [(kind, dora) for kind in ("ours", "llama") for dora in (False, True)]


@pytest.mark.parametrize(("kind", "dora"), KINDS)
def test_nothing_changes_at_injection(ours, kind, dora):
    model = makers(ours)[kind]()
    before = model(IDS)
    cls = type(model)
    add_lora(model, LoRA(rank=4, dora=dora))
    assert type(model) is cls and adapters(model)
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize(("kind", "dora"), KINDS)
def test_folded_weights_compute_what_the_adapted_model_does(ours, kind, dora):
    model = makers(ours)[kind]().double()
    base = model(IDS)
    names = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    add_lora(model, LoRA(rank=4, dora=dora))
    adapted = disturb(model)(IDS)
    assert distance(adapted, base) > 1e-2
    plain = merged_copy(model)
    assert not adapters(plain) and adapters(model)
    assert not any(hasattr(module, "peft_config") for module in plain.modules())
    assert list(plain.state_dict()) == list(makers(ours)[kind]().state_dict())
    torch.testing.assert_close(plain(IDS), adapted, **DOUBLE)
    assert {name: tensor.shape for name, tensor in merged_weights(model).items()} == names
    assert torch.equal(model(IDS), adapted)


def test_dora_folds_to_the_formula(ours):
    model = ours().double()
    before = model.blocks[0].attn.kv_b.weight.detach().clone()
    add_lora(model, LoRA(rank=4, alpha=12, dora=True, targets=["kv_b"]))
    disturb(model)
    layer = model.blocks[0].attn.kv_b
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rows = before + 12 / 4 * b @ a
    expected = layer.lora_magnitude_vector["default"].weight[:, None] * rows / rows.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(merged_weights(model)["blocks.0.attn.kv_b.weight"], expected, **DOUBLE)


def test_without_adapters_the_weights_are_the_models_own(ours):
    model = ours()
    weights = merged_weights(model)
    assert not adapters(model)
    assert all(weights[name] is parameter for name, parameter in model.named_parameters())
    assert all(weights[name] is buffer for name, buffer in model.named_buffers())


@pytest.mark.parametrize(("kind", "dora"), KINDS)
def test_off_is_the_base_to_the_bit_and_on_again_after_an_error(ours, kind, dora):
    model = makers(ours)[kind]()
    base = model(IDS)
    add_lora(model, LoRA(rank=4, dora=dora))
    adapted = disturb(model)(IDS)
    frozen = next(p for name, p in model.named_parameters() if ".lora_A." in name).requires_grad_(False)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with adapters_off(model) as off:
        assert torch.equal(off(IDS), base)
        with adapters_off(model):
            pass
        assert torch.equal(model(IDS), base)
        assert torch.equal(merged_copy(model)(IDS), base)
    with pytest.raises(KeyError, match="interrupted"), adapters_off(model):
        raise KeyError("interrupted")
    assert torch.equal(model(IDS), adapted)
    assert not frozen.requires_grad and trainable == [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("kind", "dora"), KINDS)
def test_only_adapters_train(ours, kind, dora):
    model = makers(ours)[kind]()
    report = add_lora(model, LoRA(rank=4, dora=dora))
    disturb(model).train()(IDS).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    adapting = {name for name, _ in model.named_parameters() if ".lora_" in name and not name.startswith("mtp.")}
    assert with_gradient == adapting
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable == trainable
    assert report.frozen == sum(p.numel() for p in makers(ours)[kind]().parameters())


def test_what_surrounds_the_model_is_frozen_too():
    model = Wrapped(llama())
    model.temperature = nn.Parameter(torch.ones(()))
    add_lora(model, LoRA(rank=4))
    assert not model.temperature.requires_grad


def test_the_report_names_every_matrix_once(ours):
    model = ours()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    report = add_lora(model, LoRA(rank=4))
    assert set(report.adapted) | set(report.declined) == set(matrices)
    assert {name: d.reason for name, d in report.declined.items()} == {
        "embed.weight": "an embedding",
        "head.weight": "the head",
        "blocks.1.ffn.router.weight": "a router",
        "mtp.0.block.ffn.router.weight": "a router",
    }
    for name, count in report.adapted.items():
        out_features, in_features = matrices[name].shape[-2:]
        experts = matrices[name].shape[0] if matrices[name].dim() == 3 else 1
        assert count == 4 * experts * (in_features + out_features), name
    declined = add_lora(ours(), LoRA(rank=4, dora=True)).declined
    assert declined["blocks.1.ffn.experts.down"] == (8 * 32 * 16, "peft has no DoRA for stacked experts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"adapter\.rank=0: must be at least 1"),
        ({"alpha": 0.0}, r"adapter\.alpha=0\.0: must be above 0"),
        ({"dropout": 1.0}, r"adapter\.dropout=1\.0"),
        ({"targets": "kv_b"}, r"adapter\.targets='kv_b': must be a list"),
        ({"targets": []}, r"adapter\.targets=\[\]: must be a list"),
        ({"targets": ["kv_p"]}, "called 'kv_p'; did you mean 'kv_(a|b)'"),
        ({"targets": ["router"]}, "called 'router'"),
        ({"targets": ["experts.down"], "dora": True}, "no DoRA for stacked experts: leave it out"),
        ({"targets": ["experts.down"], "dropout": 0.1}, "no dropout for stacked experts"),
    ],
)
def test_what_cannot_be_adapted_is_refused(ours, changes, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**changes).apply(ours())


def test_refusals_that_a_model_causes(ours):
    model = ours()
    add_lora(model, LoRA())
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(model, LoRA())
    with pytest.raises(ConfigError, match="row of zeros"):
        add_lora(ours(branch_gain=0.0), LoRA(dora=True))
    with pytest.raises(ConfigError, match="no linear map"):
        add_lora(nn.Embedding(3, 3), LoRA())
    with pytest.raises(ConfigError, match=r"decoding reads kv_b's weight.*merged_copy"):
        cache = model.new_cache(1, 4)
        model.decode(torch.tensor([1]), torch.tensor([0]), cache)


def test_targets_are_found_by_their_last_parts(ours):
    def adapted(*targets):
        return set(add_lora(ours(), LoRA(rank=2, targets=targets)).adapted)

    blocks = ("blocks.0", "blocks.1", "mtp.0.block")
    assert adapted("q") == {f"{b}.attn.q.{i}.weight" for b in blocks for i in (0, 2)}
    assert adapted("blocks.1.attn.q.2") == {"blocks.1.attn.q.2.weight"}
    assert adapted("experts.gate_up") == {f"{b}.ffn.experts.gate_up" for b in blocks[1:]}
    dense = {"blocks.0.ffn.down.weight"}
    assert adapted("down") == dense | {f"{b}.ffn.shared.down.weight" for b in blocks[1:]}


@pytest.mark.parametrize("dora", [False, True])
def test_a_half_precision_base_has_adapters_in_float32(dora):
    model = Wrapped(llama()).bfloat16()
    before = model(IDS)
    report = add_lora(model, LoRA(rank=4, dora=dora))
    assert torch.equal(model(IDS), before)
    assert torch.equal(merged_copy(model)(IDS), before)
    own = [p for name, p in model.named_parameters() if ".lora_" in name]
    assert {p.dtype for p in own} == {torch.float32} and sum(p.numel() for p in own) == report.trainable
    merged = merged_copy(disturb(model))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    adapted, exact = model(IDS).double(), merged_copy(model.double())(IDS)
    assert distance(exact, before) > 0.1
    assert distance(merged(IDS).double(), exact) < 3 * distance(adapted, exact)


def test_optimizer_memory_of_the_shipped_size(pytestconfig):
    """Entries of AdamW's two moments, after a step, against those of full fine-tuning."""
    path = pytestconfig.rootpath / "conf" / "model" / "arith_1m.yaml"
    shape = {k: v for k, v in yaml.safe_load(path.read_text(encoding="utf-8")).items() if k != "_target_"}

    def states(lora):
        model = Transformer(ModelConfig(**shape))
        if lora is not None:
            add_lora(model, lora)
        optimizer, _ = AdamW().build(model, total_steps=1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())

    full = states(None)
    assert full == 2 * sum(p.numel() for p in Transformer(ModelConfig(**shape)).parameters())
    for rank, most in ((8, 0.25), (16, 0.5)):
        ratio = states(LoRA(rank=rank)) / full
        print(f"rank {rank}: optimizer memory x{ratio:.3f} of {full:,} entries")
        assert ratio < most


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_strangers_load_saved_adapters_onto_the_plain_model(tmp_path, monkeypatch, dora, tied):
    from peft import PeftModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = Wrapped(llama(tie_word_embeddings=tied))
    add_lora(model, LoRA(rank=4, alpha=6, dora=dora))
    adapted = disturb(model)(IDS)
    save_adapters(model, tmp_path, base="somebody/llama")
    theirs = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, adapted, rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs.merge_and_unload()(IDS).logits, merged_copy(model)(IDS), rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("somebody/llama", "CAUSAL_LM")

    mine = Wrapped(llama(tie_word_embeddings=tied))
    report = load_adapters(mine, tmp_path)
    assert torch.equal(mine(IDS), adapted)
    assert report.trainable == sum(p.numel() for p in mine.parameters() if p.requires_grad) > 0


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_stacked_experts_of_other_models(tmp_path, monkeypatch, kind):
    """Mixtral's are (E, out, in), those of gpt-oss (E, in, out)."""
    from peft import PeftModel

    def make():
        torch.manual_seed(0)
        names = {"mixtral": ("MixtralConfig", "MixtralForCausalLM"), "gpt_oss": ("GptOssConfig", "GptOssForCausalLM")}
        config, cls = (getattr(transformers, name) for name in names[kind])
        return cls(
            config(
                vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
                head_dim=8, pad_token_id=0,
            )
        ).eval()  # fmt: skip

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = make()
    before = model(IDS).logits
    report = add_lora(model, LoRA(rank=4, targets=["experts.gate_up_proj", "experts.down_proj", "q_proj"]))
    assert torch.equal(model(IDS).logits, before)
    assert len(report.adapted) == 2 * 3
    adapted = disturb(model)(IDS).logits
    assert distance(adapted, before) > 1e-2
    torch.testing.assert_close(merged_copy(model)(IDS).logits, adapted, rtol=0, atol=1e-5)
    assert set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}
    save_adapters(model, tmp_path, base="x")
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, adapted, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_what_peft_takes_for_something_else_is_refused_with_what_to_type():
    def make():
        return transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(
                vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1,
                topk_group=1, first_k_dense_replace=1, max_position_embeddings=64,
            )
        ).eval()  # fmt: skip

    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj\.weight, .*adapter\.targets=\[") as error:
        add_lora(make(), LoRA(rank=4))
    targets = str(error.value).rpartition("=[")[2].removesuffix("]").split(",")
    model = make()
    report = add_lora(model, LoRA(rank=4, targets=targets))
    assert len(report.adapted) == 2 * 5 + 2
    adapted = disturb(model)(IDS).logits
    torch.testing.assert_close(merged_copy(model)(IDS).logits, adapted, rtol=0, atol=1e-5)


def test_peft_and_we_read_adapters_of_our_model(ours, tmp_path):
    from peft import PeftModel

    model = ours()
    add_lora(model, LoRA(rank=4))
    adapted = disturb(model)(IDS)
    save_adapters(model, tmp_path, base="arith-1m.sft")
    again = ours()
    load_adapters(again, tmp_path)
    assert torch.equal(again(IDS), adapted)
    assert torch.equal(PeftModel.from_pretrained(ours(), tmp_path)(IDS), adapted)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for targets in (config["target_modules"], config["target_parameters"]):
        assert targets == sorted(targets) and len(targets) > 1  # not the order of a set of strings


@pytest.mark.parametrize("targets", [["q_proj"], r".*\.q_proj"], ids=["list", "expression"])
def test_we_read_what_peft_saved(tmp_path, targets):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=True))
    disturb(theirs).save_pretrained(tmp_path)
    mine = llama()
    report = load_adapters(mine, tmp_path)
    assert torch.equal(mine(IDS).logits, theirs(IDS).logits)
    save_adapters(mine, tmp_path / "again", base="x")
    again = llama()
    load_adapters(again, tmp_path / "again")
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)
    torch.testing.assert_close(merged_copy(mine.double())(IDS).logits, theirs.double()(IDS).logits, **DOUBLE)
    assert report.declined["model.layers.0.mlp.up_proj.weight"].reason == "not among the targets"


def test_folders_that_do_not_fit_are_refused(ours, edit, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        load_adapters(ours(), tmp_path)
    model = ours()
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_adapters(model, tmp_path, base="")
    add_lora(model, LoRA(rank=4))
    save_adapters(model, tmp_path, base="")
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_adapters(llama(), tmp_path)
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_adapters(ours(kv_lora_rank=8), tmp_path)
    with pytest.raises(ConfigError, match="has adapters already"):
        load_adapters(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    right = json.loads(path.read_text())
    for change in ({"peft_type": "LOHA"}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["q"]}):
        path.write_text(json.dumps(right | change))
        with pytest.raises(CheckpointError, match=next(iter(change))):
            load_adapters(ours(), tmp_path)


@pytest.mark.parametrize(("name", "adapter"), [("none", {}), ("lora", LoRA()), ("dora", LoRA(dora=True))])
def test_the_configs(pytestconfig, name, adapter):
    path = pytestconfig.rootpath / "conf" / "adapter" / f"{name}.yaml"
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (instantiate(node) if node else node) == adapter


PROMPTS = [Prompt(f"{i:016x}", "", "", "test", ids) for i, ids in enumerate([(5, 6, 7, 8), (9, 3), (30,) * 9])]


@pytest.fixture
def byte_model():
    """A model with the byte tokenizer's vocabulary whose choices depend on its attention."""

    def make(seed=0):
        torch.manual_seed(seed)
        model = Transformer(
            ModelConfig(
                width=32, depth=2, heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
                ffn_width=48, experts=4, expert_width=16, max_seq_len=48, base=Base(width=32, depth=2),
            )
        )  # fmt: skip
        return model.eval()

    return make


def greedy(engine):
    out = engine.generate(PROMPTS, Sampling(max_tokens=24, temperature=0), seeds=[0] * len(PROMPTS))
    return [completion.token_ids for completion in out]


def tokens_of(model):
    engine = BuiltinEngine(ByteTokenizer(), dtype="float32")
    engine.push(model, version=0)
    return greedy(engine)


@pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=4, dora=True), LoRA(rank=4, targets=["kv_b"])], ids=str)
def test_the_engine_generates_with_folded_weights(byte_model, lora):
    model = byte_model()
    engine = BuiltinEngine(ByteTokenizer(), dtype="float32")
    engine.push(model, version=0)
    base = greedy(engine)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_lora(model, lora)
    seen = [base]
    for version in (1, 2):
        disturb(model, seed=version, scale=1.0)
        engine.push(model, version)
        seen.append(greedy(engine))
        assert seen[-1] == tokens_of(merged_copy(model)) != seen[-2]
        assert engine.version() == version and adapters(model)
    with adapters_off(model):
        weights = merged_weights(model)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert seen[2] != base


def test_engines_in_half_precision_refresh_their_copy(byte_model):
    model = byte_model()
    add_lora(model, LoRA(rank=4))
    engine = BuiltinEngine(ByteTokenizer())
    engine.push(model, version=0)
    copied = engine.model
    disturb(model)
    engine.push(model, version=1)
    assert engine.model is copied
    assert checksum(copied) == checksum(merged_copy(model).bfloat16())


def wide(width):
    m = width // 64
    return ModelConfig(
        width=width, depth=4, heads=2 * m, q_lora_rank=32 * m, kv_lora_rank=16 * m,
        ffn_width=96 * m, expert_width=24 * m,
        base=Base(64, depth=2, heads=2, q_lora_rank=32, kv_lora_rank=16, ffn_width=96, expert_width=24),
    )  # fmt: skip


def test_roles_at_two_widths():
    """At m = 4 times the base's width and twice its depth: A's rate as its matrix's, B's as at the base."""
    roles = {}
    for width in (64, 256):
        model = Transformer(wide(width))
        add_lora(model, LoRA(rank=4))
        roles[width] = parameter_roles(model)
        assert set(roles[width]) == {name for name, _ in model.named_parameters()}
    for name, role in roles[256].items():
        at_base, m = roles[64][name], 4
        if ".lora_A." in name:
            assert (at_base.kind, at_base.lr, at_base.weight_decay, at_base.eps) == ("lora_a", 1.0, 1.0, 1 / 2)
            assert (role.kind, role.lr, role.weight_decay, role.eps) == ("lora_a", 1 / m, m, 1 / (2 * m)), name
        elif ".lora_B." in name:
            assert (at_base.kind, at_base.lr, at_base.weight_decay, at_base.eps) == ("lora_b", 1.0, 1.0, 1 / 2)
            assert (role.kind, role.lr, role.weight_decay, role.eps) == ("lora_b", 1.0, 1.0, 1 / (2 * m)), name
        assert role.matrices is None or ".lora_" not in name
    assert sum(role.kind == "lora_a" for role in roles[256].values()) == 5 * 4 + 2 + 3 * 4


def test_the_spread_of_a_is_its_roles():
    """peft draws A uniformly in +-1/sqrt(fan_in), whose standard deviation is that over sqrt(3): A x does not grow."""
    for width in (64, 256):
        model = Transformer(wide(width))
        add_lora(model, LoRA(rank=64))
        roles = parameter_roles(model)
        for name in ("attn.kv_a.lora_A", "ffn.experts.lora_A", "ffn.experts.base_layer.lora_A"):
            a, role = (source(f"blocks.1.{name}.default.weight") for source in (model.get_parameter, roles.get))
            assert role.init_std == pytest.approx((3 * a.shape[-1]) ** -0.5)
            assert a.std().item() == pytest.approx(role.init_std, rel=0.03)


def first_a_after_training(width, exempt):
    """RMS of A x in the first block after four steps; `exempt`: with A's rate as at the base's width."""
    torch.manual_seed(0)
    model = Transformer(wide(width))
    add_lora(model, LoRA(rank=8, targets=["kv_a", "kv_b", "out"]))
    roles = parameter_roles(model)
    if exempt:
        roles = {name: replace(role, lr=1.0) if role.kind == "lora_a" else role for name, role in roles.items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2**-6, weight_decay=0.0, eps=1e-12, roles=roles))
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
    seen = []
    model.blocks[0].attn.kv_a.lora_A["default"].register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    model(IDS)
    return seen[0].square().mean().sqrt().item()


def test_a_moves_as_much_at_every_width():
    at_base = first_a_after_training(64, exempt=False)
    assert first_a_after_training(256, exempt=False) == pytest.approx(at_base, rel=0.1)
    assert first_a_after_training(256, exempt=True) > 1.3 * at_base


def test_roles_of_what_is_frozen_and_of_magnitudes(ours):
    model, plain = ours(), parameter_roles(ours())
    add_lora(model, LoRA(rank=4, dora=True))
    roles = parameter_roles(nn.ModuleDict({"policy": model}))
    for name, parameter in model.named_parameters():
        role = roles[f"policy.{name}"]
        if ".lora_magnitude_vector." in name:
            assert (role.kind, role.lr, role.weight_decay) == ("lora_norm", 1.0, 0.0), name
        elif ".lora_" not in name:
            assert role == plain[name.replace(".base_layer", "")], name
            assert not parameter.requires_grad


def test_roles_of_strangers_models_have_no_multipliers():
    model = Wrapped(llama())
    add_lora(model, LoRA(rank=4, dora=True))
    roles = parameter_roles(model)
    assert set(roles) == {name for name, _ in model.named_parameters()}
    decays = {"lora_a": 1.0, "lora_b": 1.0, "lora_norm": 0.0}
    found = {role.kind: (role.lr, role.weight_decay, role.eps) for n, role in roles.items() if ".lora_" in n}
    assert found == {kind: (1.0, decay, 1.0) for kind, decay in decays.items()}
    assert roles["lm.model.layers.0.self_attn.q_proj.base_layer.weight"].matrices is not None
    assert roles["lm.lm_head.weight"].matrices is None


@pytest.mark.parametrize("recipe", [AdamW(lr=1e-2), Muon(lr=1e-2)], ids=["adamw", "muon"])
def test_optimizers_take_the_adapters_alone(ours, recipe):
    model = ours()
    add_lora(model, LoRA(rank=4))
    optimizer, _ = recipe.build(model, total_steps=1)
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert taken == {id(p) for p in model.parameters() if p.requires_grad}
    with adapters_off(model):
        base = model(IDS)
    before = model(IDS)
    before.square().mean().backward()
    optimizer.step()
    assert distance(model(IDS), before) > 0
    with adapters_off(model):
        assert torch.equal(model(IDS), base)


def test_copies_checksums_and_routers_of_a_model_with_adapters(ours):
    model = ours()
    base = checksum(model)
    add_lora(model, LoRA(rank=4))
    disturb(model)
    assert base_checksum(model) == base == base_checksum(ours()) != checksum(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS)) and checksum(twin) == checksum(model)
    disturb(twin, seed=2)
    assert checksum(twin) != checksum(model)
    assert len(model.routers()) == 2


class Lit(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return AdamW(lr=1e-2).build(self.model, total_steps=2)[0]


def test_a_lightning_checkpoint_goes_round(ours, tmp_path):
    def module(seed):
        model = ours()
        torch.manual_seed(seed)
        add_lora(model, LoRA(rank=4))
        return Lit(model)

    def trainer(steps):
        return Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip

    first, batches = module(1), [IDS[:, :6], IDS[:, 6:]]
    before = trainer(1)
    before.fit(first, torch.utils.data.DataLoader(batches, batch_size=None))
    before.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    second = module(2)
    assert checksum(second) != checksum(first)
    second.load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])
    assert checksum(second) == checksum(first)
    assert torch.equal(second.model.eval()(IDS), first.model.eval()(IDS))
