"""The experts that the engine says it chose are those of a plain forward over the same tokens."""

import pytest
import torch

from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.rollout import BuiltinEngine, Sampling


@pytest.fixture
def deep() -> Transformer:
    """Three blocks, of which the last two have 6 experts, 2 chosen; biases that matter."""
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            width=32, depth=3, heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
            ffn_width=48, experts=6, expert_width=16, max_seq_len=64, base=Base(width=32, depth=3), mtp_depth=1,
        )
    )  # fmt: skip
    for router in model.routers():
        router.bias_E.normal_(std=0.1)
    return model


def routed(model: Transformer, ids: tuple[int, ...]) -> torch.Tensor:
    """(S, L, K): what the trunk's routers choose for these tokens, asked one by one."""
    chosen = []
    hooks = [
        block.ffn.router.register_forward_hook(lambda module, inputs, out: chosen.append(out.experts_NK))
        for block in model.blocks[1:]
    ]
    with torch.no_grad():
        model.eval()(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, dim=1).to(torch.int16)


@pytest.mark.parametrize("max_rows", [512, 24])
def test_experts_are_those_of_a_plain_forward(tokenizer, deep, prompts, max_rows):
    engine = BuiltinEngine(tokenizer, dtype="float32", max_rows=max_rows, return_experts=True)
    engine.push(deep, 0)
    asked = [prompt for prompt in prompts(12) for _ in range(4)]
    limits = [1 + 7 * i % 30 for i in range(48)]
    found = engine.generate(asked, Sampling(), range(48), limits=limits)
    assert len({len(c.token_ids) for c in found}) > 10
    for prompt, done in zip(asked, found, strict=True):
        read = (*prompt.token_ids, *done.token_ids[:-1])
        assert done.experts_SLK is not None and done.experts_SLK.dtype == torch.int16
        assert torch.equal(done.experts_SLK, routed(deep, read))
    silent = BuiltinEngine(tokenizer, dtype="float32", return_experts=False)
    silent.push(deep, 0)
    same = silent.generate(asked, Sampling(), range(48), limits=limits)
    assert [c.token_ids for c in same] == [c.token_ids for c in found]
    assert all(c.experts_SLK is None for c in same)


def test_nothing_listens_afterwards(tokenizer, deep, prompts, monkeypatch):
    engine = BuiltinEngine(tokenizer, dtype="float32", return_experts=True)
    engine.push(deep, 0)
    engine.generate(prompts(2), Sampling(max_tokens=2), [0, 1])
    assert not any(router._forward_hooks for router in deep.routers())
    monkeypatch.setattr(type(deep), "decode_states", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(prompts(2), Sampling(max_tokens=2), [0, 1])
    assert not any(router._forward_hooks for router in deep.routers())


def test_a_model_without_experts_tells_nothing(tokenizer, prompts):
    torch.manual_seed(0)
    engine = BuiltinEngine(tokenizer, return_experts=True)
    engine.push(Transformer(ModelConfig(width=32, depth=2, heads=2, first_dense=2, max_seq_len=64)), 0)
    assert engine.generate(prompts(1), Sampling(max_tokens=3), [0])[0].experts_SLK is None
