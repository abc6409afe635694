"""Multi-token prediction: the module against its formula, what it may see, its roles."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lit_reason.errors import ConfigError
from lit_reason.models import ModelConfig, Transformer, parameter_roles
from lit_reason.models.attention import causal
from lit_reason.models.rope import rope_table

SHAPE = {"vocab_size": 50, "width": 32, "heads": 2, "kv_lora_rank": 12, "ffn_width": 48, "experts": 4}


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(3)
    config = ModelConfig(**SHAPE, depth=8, expert_width=16, max_seq_len=32, mtp_depth=2)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("mtp") and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)  # gains of 1 would hide that the norms are told apart
    return model


def rms(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def test_a_module_is_its_formula(model):
    """h' = block(M [enorm(Emb t_{i+1}); hnorm(h_i)]), norm for the head: the order of the released weights."""
    ids = torch.randint(0, 50, (2, 10))
    hidden = model.hidden(ids[:, :-1])
    states, embedded = hidden.states_BTD, model.embed(ids[:, 1:])
    module = model.mtp[0]
    joined = torch.cat((rms(embedded, module.enorm.weight), rms(states, module.hnorm.weight)), -1)
    x = joined @ module.eh_proj.weight.t()
    rotation = rope_table(model.config, x.device)[:9]
    x = x + module.block.attn(rms(x, module.block.attn_norm.weight), rotation, causal)  # not scaled by 1/m_L = 1/2
    x = x + module.block.ffn(rms(x, module.block.ffn_norm.weight))[0]
    got = model.further(hidden, ids[:, 1:])
    torch.testing.assert_close(got[0].states_BTD, rms(x, module.norm.weight), atol=1e-5, rtol=1e-5)


def test_logits_are_those_of_transformers(parity):
    """Written by `scripts/hf_parity.py --mtp` under transformers 5.23, the first that has it."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "mtp.json").read_text())
    ours = parity.our_mtp(parity.mtp_model(), parity.mtp_ids())
    assert len(ours) == len(golden["logits"]) == 2
    for logits_BTV, theirs in zip(ours, golden["logits"], strict=True):
        assert logits_BTV.std() > 0.3
        torch.testing.assert_close(logits_BTV, torch.tensor(theirs), atol=1e-5, rtol=0)


def test_depth_k_sees_k_tokens_further_and_no_more(model):
    """State i of depth k depends on t_0 .. t_{i+k} and on nothing after."""
    ids = torch.randint(0, 50, (1, 12))

    def states(ids):
        return [h.states_BTD for h in model.further(model.hidden(ids[:, :-1]), ids[:, 1:])]

    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    for k, (before, after) in enumerate(zip(states(ids), states(changed), strict=True), start=1):
        same = (before == after).all(-1)[0, : 11 - k + 1]
        assert same.tolist() == [i + k < 7 for i in range(len(same))]


def test_the_trunk_does_not_know_of_it(model):
    torch.manual_seed(3)
    plain = Transformer(ModelConfig(**SHAPE, depth=8, expert_width=16, max_seq_len=32))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp")})
    ids = torch.randint(0, 50, (2, 9))
    assert torch.equal(model(ids), plain.eval()(ids))


def test_roles():
    wide = Transformer(ModelConfig(**(SHAPE | {"width": 256}), depth=8, expert_width=64, mtp_depth=1))
    roles = parameter_roles(wide)
    m = 256 / 64
    assert roles["mtp.0.eh_proj.weight"].kind == "hidden"
    assert roles["mtp.0.eh_proj.weight"].lr == 1 / m
    assert roles["mtp.0.eh_proj.weight"].init_std == pytest.approx(512**-0.5)
    assert roles["mtp.0.eh_proj.weight"].eps == 1 / m  # one block whatever the depth: no 1/m_L
    assert roles["blocks.0.attn.out.weight"].eps == 1 / (m * 2)
    assert {roles[f"mtp.0.{name}.weight"].kind for name in ("enorm", "hnorm", "norm")} == {"norm"}
    assert len(wide.routers()) == 8  # 7 of the trunk, whose first layer is dense, and the module's


def test_learning_to_look_further():
    """On rows that count upwards in threes."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, depth=1, expert_width=16, mtp_depth=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        ids = (torch.randint(0, 50, (16, 1)) + 3 * torch.arange(14)) % 50
        hidden = model.hidden(ids[:, :-1])
        states = model.further(hidden, ids[:, 1:])[0].states_BTD[:, :-1]
        loss = F.cross_entropy(model.head(states).flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5 and losses[-1] < 1.0


def test_a_negative_depth_is_refused():
    with pytest.raises(ConfigError, match="mtp_depth=-1"):
        ModelConfig(mtp_depth=-1)
