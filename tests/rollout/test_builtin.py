"""The engine against full forwards of the same model."""

from dataclasses import replace

import pytest
import torch

from lit_reason.errors import ConfigError, RolloutError
from lit_reason.rollout import BuiltinEngine, Engine, Sampling


def next_logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids]))[0, -1]


def test_greedy_is_the_argmax_of_the_full_forward(engine, model, prompts, tokenizer):
    for prompt, done in zip(
        prompts(4), engine.generate(prompts(4), Sampling(0.0, max_tokens=12), [0] * 4), strict=True
    ):
        ids, expected = list(prompt.token_ids), []
        while len(expected) < 12 and not (expected and expected[-1] in tokenizer.stop_ids):
            expected.append(int(next_logits(model, ids + expected).argmax()))
        assert list(done.token_ids) == expected


def test_log_probs_equal_the_full_forward_at_the_temperature(engine, model, prompts):
    asked = prompts(8)
    for prompt, done in zip(asked, engine.generate(asked, Sampling(0.7, max_tokens=24), range(8)), strict=True):
        ids = torch.tensor([[*prompt.token_ids, *done.token_ids]])
        with torch.no_grad():
            table = (model.eval()(ids)[0, :-1] / 0.7).log_softmax(-1)
        start = len(prompt.token_ids) - 1
        expected = table[start:].gather(1, ids[0, start + 1 :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)


def test_a_row_is_the_same_alone_and_in_any_batch(engine, prompts):
    """40 rows that end at different times, so that finished ones are dropped from the batch in between."""
    asked, sampling, seeds = prompts(40), Sampling(1.0, max_tokens=40), list(range(100, 140))
    together = engine.generate(asked, sampling, seeds)
    lengths = sorted(len(c.token_ids) for c in together)
    assert lengths[12] < 15 and lengths[-1] > 30, "the batch must shrink while it runs"
    alone = [engine.generate([p], sampling, [s])[0] for p, s in zip(asked, seeds, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)
    backwards = engine.generate(asked[::-1], sampling, seeds[::-1])[::-1]
    assert [c.token_ids for c in backwards] == [c.token_ids for c in together]
    engine.max_rows = 7
    assert [c.token_ids for c in engine.generate(asked, sampling, seeds)] == [c.token_ids for c in together]


def test_samples_of_one_prompt_differ_and_carry_what_was_asked(engine, prompts):
    prompt = prompts(1)[0]
    out = engine.generate([prompt] * 4, Sampling(max_tokens=10), [11, 12, 13, 11], sample_idx=[0, 1, 2, 3])
    assert [c.sample_idx for c in out] == [0, 1, 2, 3] and [c.seed for c in out] == [11, 12, 13, 11]
    assert {c.prompt_id for c in out} == {prompt.id} and {c.version for c in out} == {3}
    assert out[0].token_ids == out[3].token_ids != out[1].token_ids


def test_the_stop_token_is_included_and_left_out_of_the_text(engine, prompts, tokenizer):
    out = engine.generate(prompts(40), Sampling(max_tokens=20), range(40))
    reasons = {c.finish_reason for c in out}
    assert reasons == {"stop", "length"}
    for c in out:
        ids = list(c.token_ids)
        ended = ids[-1] in tokenizer.stop_ids
        assert c.finish_reason == ("stop" if ended else "length")
        assert not set(ids[:-1]) & set(tokenizer.stop_ids)
        assert len(ids) == len(c.logprobs) and (ended or len(ids) == 20)
        assert c.text == tokenizer.decode(ids[:-1] if ended else ids)


def test_the_context_limit_ends_a_row_with_length(tokenizer, make_model, prompts):
    model = make_model(stop_gain=0.0, max_seq_len=24)
    engine = BuiltinEngine(tokenizer, dtype="float32")
    engine.push(model, 0)
    asked = prompts(4)
    out = engine.generate(asked, Sampling(0.0, max_tokens=100), [0] * 4)
    for prompt, c in zip(asked, out, strict=True):
        assert (c.finish_reason, len(prompt.token_ids) + len(c.token_ids)) == ("length", 24)
        for t in range(len(c.token_ids)):  # right to the last position
            ids = [*prompt.token_ids, *c.token_ids[:t]]
            assert int(next_logits(model, ids).argmax()) == c.token_ids[t]


def test_bfloat16_weights_change_on_push_only(tokenizer, model, prompts):
    engine = BuiltinEngine(tokenizer)  # bfloat16 is the default
    engine.push(model, 0)
    held = {n: t.clone() for n, t in engine.model.state_dict().items()}
    assert engine.model.embed.weight.dtype == torch.bfloat16
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
        model.routers()[0].bias_E.add_(1e-3)
    assert all(torch.equal(t, held[n]) for n, t in engine.model.state_dict().items())
    copy = engine.model
    engine.push(model, 1)
    assert engine.model is copy and engine.version() == 1
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name
    assert engine.model.routers()[0].bias_E.dtype == torch.float32
    assert engine.generate(prompts(1), Sampling(max_tokens=3), [0])[0].version == 1


def test_bfloat16_log_probs_are_close_to_the_policy(tokenizer, model, prompts):
    engine = BuiltinEngine(tokenizer)
    engine.push(model, 0)
    exact = BuiltinEngine(tokenizer, dtype="float32")
    exact.push(model, 0)
    asked = prompts(16)
    rough = engine.generate(asked, Sampling(max_tokens=1), range(16))
    fine = exact.generate(asked, Sampling(max_tokens=1), range(16))
    same = [(a.logprobs[0], b.logprobs[0]) for a, b in zip(rough, fine, strict=True) if a.token_ids == b.token_ids]
    assert len(same) >= 12 and all(abs(a - b) < 0.15 for a, b in same)


def test_float32_shares_the_weights_and_leaves_the_mode(engine, model, prompts):
    assert engine.model is model
    for mode in (True, False):
        model.train(mode)
        engine.generate(prompts(2), Sampling(max_tokens=2), [0, 1])
        assert model.training is mode and model.blocks[1].ffn.training is mode
    assert model.routers()[0].load_E.sum() == 0 and all(p.requires_grad for p in model.parameters())


def test_progress_ends_with_the_totals(engine, prompts):
    engine.max_rows = 3
    seen = []
    out = engine.generate(prompts(8), Sampling(max_tokens=6), range(8), progress=seen.append)
    last = seen[-1]
    assert (last.done, last.total) == (8, 8)
    assert last.tokens == sum(len(c.token_ids) for c in out)
    assert last.seconds > 0 and [p.done for p in seen] == sorted(p.done for p in seen)


def test_errors_say_what_to_do(tokenizer, engine, prompts):
    with pytest.raises(RolloutError, match=r"call engine.push\(model, version\) first"):
        BuiltinEngine(tokenizer).generate(prompts(1), Sampling(), [0])
    long = replace(prompts(1)[0], token_ids=tuple(range(64)))
    with pytest.raises(RolloutError, match=r"has 64 tokens; valid 1..63 .*model.max_seq_len=64"):
        engine.generate([long], Sampling(), [0])
    with pytest.raises(RolloutError, match="2 prompts and 1 seeds"):
        engine.generate(prompts(2), Sampling(), [0])
    with pytest.raises(RolloutError, match="got Linear"):
        engine.push(torch.nn.Linear(2, 2), 0)
    with pytest.raises(ConfigError, match="dtype='fp16': valid bfloat16, float32"):
        BuiltinEngine(tokenizer, dtype="fp16")
    with pytest.raises(ConfigError, match="max_rows=0"):
        BuiltinEngine(tokenizer, max_rows=0)
    assert engine.generate([], Sampling(), []) == []
    assert isinstance(engine, Engine)
