"""Drafts change how many steps greedy decoding takes, and nothing else."""

import pytest
import torch
import torch.nn.functional as F

from lit_reason.data.tokenizer import ByteTokenizer
from lit_reason.errors import ConfigError
from lit_reason.models import ModelConfig, Transformer
from lit_reason.rollout import BuiltinEngine, Sampling

CIRCLE = torch.tensor([*b"abcdefghij", ByteTokenizer().stop_ids[0]])


@pytest.fixture(scope="module")
def drafting() -> Transformer:
    """A model that has half learned to say the letters in order, trained for a few seconds: a random module's drafts
    are never accepted, and a perfect one's always."""
    torch.manual_seed(0)
    shape = {"width": 32, "depth": 2, "heads": 2, "kv_lora_rank": 12, "ffn_width": 48, "experts": 4, "expert_width": 16}
    model = Transformer(ModelConfig(**shape, max_seq_len=64, mtp_depth=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        ids = CIRCLE[(torch.randint(0, 11, (16, 1)) + torch.arange(25)) % 11]
        hidden = model.hidden(ids[:, :-1])
        further = model.further(hidden, ids[:, 1:])[0]
        loss = F.cross_entropy(model.head(hidden.states_BTD).flatten(0, 1), ids[:, 1:].flatten())
        loss = loss + F.cross_entropy(model.head(further.states_BTD[:, :-1]).flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("stop_id", [CIRCLE[-1].item(), 271])  # the second never comes: rows end at the limits
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 10**11])
def test_the_tokens_are_those_of_plain_greedy_decoding(drafting, prompts, max_tokens, stop_id):
    tokenizer = ByteTokenizer()
    tokenizer.stop_ids = (stop_id,)
    asked, sampling = prompts(60), Sampling(temperature=0.0, max_tokens=max_tokens)
    plain, drafts = (BuiltinEngine(tokenizer, "float32", speculative=flag) for flag in (False, True))
    found = []
    for engine in (plain, drafts):
        engine.push(drafting, version=0)
        found.append(engine.generate(asked, sampling, seeds=range(60)))
    for a, b in zip(*found, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)
    assert plain.drafted == 0 and (drafts.drafted == 0) == (max_tokens == 1)
    if max_tokens > 2:
        assert 0 < drafts.accepted < drafts.drafted


def test_the_draft_is_what_training_makes_of_the_same_tokens(drafting):
    """Cached and absorbed, two positions at a time, the module equals its training forward."""
    ids = CIRCLE[(torch.randint(0, 11, (3, 1)) + torch.arange(13)) % 11]
    hidden = drafting.hidden(ids[:, :-1])
    wanted = drafting.head(drafting.further(hidden, ids[:, 1:])[0].states_BTD)
    cache = drafting.new_cache(3, 16, draft=True)
    first = drafting.hidden(ids[:, :8], cache=cache)
    start = drafting.head(drafting.prefill_draft(first, ids[:, 1:9], cache))
    torch.testing.assert_close(start, wanted[:, :8], atol=1e-5, rtol=1e-5)
    for at in (8, 10):
        cursor = drafting.cursor(torch.arange(at, at + 2).expand(3, 2), cache)
        states = drafting.decode_states(ids[:, at : at + 2], cursor)
        torch.testing.assert_close(states, hidden.states_BTD[:, at : at + 2], atol=1e-5, rtol=1e-5)
        got = drafting.draft(states, ids[:, at + 1 : at + 3], cursor)
        torch.testing.assert_close(got, wanted[:, at : at + 2], atol=1e-5, rtol=1e-5)


def test_samples_are_drawn_as_before(drafting, prompts, tokenizer):
    sampling, found = Sampling(max_tokens=9), []
    for flag in (False, True):
        engine = BuiltinEngine(tokenizer, "float32", speculative=flag)
        engine.push(drafting, version=0)
        found.append([c.token_ids for c in engine.generate(prompts(6), sampling, seeds=range(6))])
    assert found[0] == found[1]


def test_a_model_without_the_module_is_refused(model, tokenizer):
    with pytest.raises(ConfigError, match=r"model\.mtp_depth=1"):
        BuiltinEngine(tokenizer, speculative=True).push(model, version=0)
