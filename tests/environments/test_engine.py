"""Episodes on the real engine: what the policy wrote is as if it had been written in one go, the rest has mask 0."""

import pytest
import torch

from lit_reason.data import ChatTemplate
from lit_reason.environments import EnvironmentEngine, Step, Tools
from lit_reason.errors import ConfigError, RolloutError
from lit_reason.rollout import Engine, Sampling, request_seed
from lit_reason.types import Completion


def stretches(completion):
    """[(mask, token ids)] of each stretch of one author."""
    out, mask = [], completion.mask or (1,) * len(completion.token_ids)
    for token, own in zip(completion.token_ids, mask, strict=True):
        if not out or out[-1][0] != own:
            out.append((own, []))
        out[-1][1].append(token)
    return out


def pieces(completion, tokenizer):
    """The same as text."""
    return [(own, tokenizer.decode(ids)) for own, ids in stretches(completion)]


def test_an_episode_that_never_asks_is_the_engines_completion(plain, play, echo, prompts):
    environment = echo()
    environment.asks = lambda text: False
    engine, sampling, seeds = play(environment), Sampling(0.9, max_tokens=20), range(100, 112)
    assert isinstance(engine, Engine) and engine.version() == 3
    assert engine.generate(prompts(12), sampling, seeds) == plain.generate(prompts(12), sampling, seeds)
    assert len(environment.seen) == 1


def test_turns_and_answers_alternate_and_only_the_turns_count(play, echo, prompts, tokenizer):
    environment = echo(max_turns=3)
    done = play(environment).generate(prompts(8), Sampling(1.0, max_tokens=60), range(8), list(range(8)))
    asked = 0
    for row, completion in enumerate(done):
        parts = pieces(completion, tokenizer)
        assert [own for own, _ in parts] == [1, 0, 1, 0, 1][: len(parts)] and completion.sample_idx == row
        # The answer's own `</answer>` is taken out: it could stand for the policy's.
        assert [text for own, text in parts if not own] == ["<result>#1</result>", "<result>#2</result>"][
            : len(parts) // 2
        ]
        for place, (own, ids) in enumerate(stretches(completion)[:-1]):
            if own:  # cut where it first asks
                assert environment.asks(tokenizer.decode(ids)) and not environment.asks(tokenizer.decode(ids[:-1]))
                asked += place > 0
        assert "".join(text for _, text in parts).removesuffix("<|end|>") == completion.text
    assert asked > 4 and len(environment.seen) == 3, "the case must have rows of several turns"


def test_log_probs_are_those_of_the_whole_read_at_once(play, echo, prompts, model):
    asked = prompts(8)
    for prompt, done in zip(asked, play(echo()).generate(asked, Sampling(0.7, max_tokens=50), range(8)), strict=True):
        ids, start = torch.tensor([[*prompt.token_ids, *done.token_ids]]), len(prompt.token_ids) - 1
        with torch.no_grad():
            table = (model.eval()(ids)[0, :-1] / 0.7).log_softmax(-1)
        expected = table[start:].gather(1, ids[0, start + 1 :, None]).squeeze(1)
        own = torch.tensor(done.mask).bool()
        assert 0 < own.sum() < len(own)
        torch.testing.assert_close(torch.tensor(done.logprobs)[own], expected[own], atol=1e-4, rtol=0)
        assert torch.tensor(done.logprobs)[~own].eq(0).all()


def test_a_row_is_the_same_alone_and_in_any_batch(play, echo, prompts):
    """The limit of a turn is that of the row with most room left: the others are cut to their own."""
    asked, sampling, seeds = prompts(16), Sampling(1.0, max_tokens=40), list(range(100, 116))
    together = play(echo()).generate(asked, sampling, seeds)
    alone = [play(echo()).generate([p], sampling, [s])[0] for p, s in zip(asked, seeds, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert (a.token_ids, a.mask, a.finish_reason, a.text) == (b.token_ids, b.mask, b.finish_reason, b.text)
    assert together[0].token_ids != play(echo()).generate(asked, sampling, seeds[::-1])[0].token_ids


@pytest.mark.parametrize("limit", ["max_tokens", "context"])
def test_no_limit_is_passed_and_no_answer_is_cut(echo, prompts, tokenizer, make_model, limit, plain):
    """An answer has 19 or 20 tokens; of 36 at most one fits."""
    engine = EnvironmentEngine(plain, echo(max_turns=9), tokenizer)
    engine.push(make_model(max_seq_len=96 if limit == "max_tokens" else 36), 0)
    asked = prompts(16)
    done = engine.generate(asked, Sampling(1.0, max_tokens=36 if limit == "max_tokens" else 99), range(20, 36))
    for prompt, completion in zip(asked, done, strict=True):
        room = 36 if limit == "max_tokens" else 36 - len(prompt.token_ids)
        assert len(completion.token_ids) <= room
        for own, text in pieces(completion, tokenizer):
            assert own or text in ("<result>#1</result>", "<result>#2</result>")
        assert pieces(completion, tokenizer)[-1][0] == 1, "a completion ends with the policy's own"
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in tokenizer.stop_ids)
    assert any(c.mask for c in done) and {c.finish_reason for c in done} >= {"length"}


class Scripted:
    """An engine that writes given texts, turn by turn (one for all rows, or one each), within its limit."""

    def __init__(self, tokenizer, turns, **facts):
        self.tokenizer, self.turns, self.facts, self.asked = tokenizer, list(turns), facts, []

    def generate(self, prompts, sampling, seeds, sample_idx=None, progress=None):
        self.asked.append((prompts, sampling, list(seeds)))
        texts, version = self.turns.pop(0)
        texts = [texts] * len(prompts) if isinstance(texts, str) else texts
        return [self._write(*row, version, sampling) for row in zip(prompts, texts, seeds, sample_idx, strict=True)]

    def _write(self, prompt, text, seed, idx, version, sampling):
        ids = tuple(self.tokenizer.encode(text, specials=True))[: sampling.max_tokens]
        logprobs = tuple(-float(t) for t in range(1, len(ids) + 1))
        finish = "stop" if ids[-1] in self.tokenizer.stop_ids else "length"
        facts = {name: fact(len(prompt.token_ids), len(ids), version) for name, fact in self.facts.items()}
        return Completion(prompt.id, idx, ids, logprobs, "", finish, version, seed, **facts)

    def push(self, model, version): ...

    def version(self):
        return 0

    def close(self):
        return "closed"


def upper(requests):
    return [request.upper() for request in requests]


def test_a_call_ends_the_turn_and_what_follows_it_is_dropped(tokenizer, prompts):
    script = Scripted(tokenizer, [("<think><up>ab</up>never", 5), ("AB</think><answer>2</answer><|end|>", 5)])
    engine = EnvironmentEngine(script, Tools({"up": upper}), tokenizer)
    (done,) = engine.generate(prompts(1), Sampling(max_tokens=80), [77], [2])
    assert done.text == "<think><up>ab</up><result>AB</result>AB</think><answer>2</answer>"
    own, answer, rest = 1 + len("<up>ab</up>"), len("<result>AB</result>"), len("AB") + 2 + 1 + 1 + 1
    assert done.mask == (1,) * own + (0,) * answer + (1,) * rest and done.finish_reason == "stop"
    assert done.logprobs[:own] == tuple(-float(t) for t in range(1, own + 1))
    assert done.logprobs[own:] == (0.0,) * answer + tuple(-float(t) for t in range(1, rest + 1))
    (first, sampling, seeds), (second, later, seeds_2) = script.asked
    assert second[0].token_ids == first[0].token_ids + done.token_ids[: own + answer]
    assert (sampling.max_tokens, later.max_tokens) == (80, 80 - own - answer)
    assert seeds == [77] and seeds_2 == [request_seed(77, 1, first[0].id, 2)] and done.seed == 77
    assert engine.close() == "closed"


def test_the_last_call_of_max_turns_is_not_answered(tokenizer, prompts):
    script = Scripted(tokenizer, [("<up>a</up>", 0), ("<up>b</up>", 0)])
    (done,) = EnvironmentEngine(script, Tools({"up": upper}, max_turns=2), tokenizer).generate(
        prompts(1), Sampling(max_tokens=99), [0]
    )
    assert done.text == "<up>a</up><result>A</result><up>b</up>" and done.finish_reason == "length"


def test_each_row_is_cut_at_its_own_limit(tokenizer, prompts):
    """After its answer row 1 has 8 tokens less left than row 0: the engine is asked for row 0's."""
    script = Scripted(tokenizer, [(["<up>a</up>", "12345678<up>b</up>"], 0), ("x" * 99, 0)])
    one, two = EnvironmentEngine(script, Tools({"up": upper}), tokenizer).generate(
        prompts(2), Sampling(max_tokens=40), [0, 1]
    )
    used = len("<up>a</up><result>A</result>")
    assert script.asked[1][1].max_tokens == 40 - used
    assert one.text.endswith("</result>" + "x" * (40 - used)) and one.finish_reason == "length"
    assert two.text.endswith("</result>" + "x" * (40 - used - 8)) and two.finish_reason == "length"


def test_changes_of_weights_are_told_where_they_happened(tokenizer, prompts):
    """Turn 0 by 3, from its token 2 on by 4 (its token 12 is cut off); turn 1 by 5; turn 2 still by 5."""
    script = Scripted(
        tokenizer,
        [("<up>a</up>xxxx", 3), ("<up>b</up>", 5), ("c<|end|>", 5)],
        switches=lambda start, n, version: ((2, 4), (12, 9)) if version == 3 else (),
    )
    (done,) = EnvironmentEngine(script, Tools({"up": upper}), tokenizer).generate(
        prompts(1), Sampling(max_tokens=99), [0]
    )
    assert done.version == 3 and done.switches == ((2, 4), (len("<up>a</up><result>A</result>"), 5))


def test_the_experts_of_all_turns_become_one_table(tokenizer, prompts):
    """The first turn chose 1 for the 3 + 10 - 1 tokens that it read and kept, unknown at 3; the second, with 5 tokens
    in its cache, chose 2. What the first knows counts: its tokens were drawn by that."""

    def experts(start, n, version):
        known = torch.full((start + n - 1, 2, 3), version, dtype=torch.int16)
        known[slice(3, 4) if version == 1 else slice(0, 5)] = -1
        return known

    script = Scripted(tokenizer, [("<up>a</up>xxxx", 1), ("c<|end|>", 2)], experts_SLK=experts)
    (done,) = EnvironmentEngine(script, Tools({"up": upper}), tokenizer).generate(
        prompts(1), Sampling(max_tokens=99), [0]
    )
    S = 3 + len(done.token_ids) - 1
    assert done.experts_SLK.shape == (S, 2, 3) and done.experts_SLK.dtype == torch.int16
    assert done.experts_SLK[:, 0, 0].tolist() == [1] * 3 + [-1] + [1] * 8 + [2] * (S - 12)


def test_a_message_of_the_user_follows_the_stop_token(tokenizer, prompts):
    class Game:
        max_turns = 3

        def reset(self, prompts, seeds):
            return [0] * len(prompts)

        def asks(self, text):
            return False

        def step(self, states, turns):
            return [Step(s + 1, f"you said {t.text}", role="user") for s, t in zip(states, turns, strict=True)]

    script = Scripted(tokenizer, [("a<|end|>", 0), ("no end", 0), ("unasked", 0)])
    (done,) = EnvironmentEngine(script, Game(), tokenizer).generate(prompts(1), Sampling(max_tokens=99), [0])
    assert done.text == "a<|end|><|user|>you said a<|assistant|>no end" and done.finish_reason == "length"
    assert tokenizer.bos_id not in done.token_ids


def test_a_fault_ends_the_row_alone(play, echo, prompts):
    done = play(echo()).generate(prompts(4), Sampling(1.0, max_tokens=40), [11, 12, 13, 14])
    assert [c.fault for c in done] == ["", "", "out of order", ""] and done[2].mask is None


def test_progress_counts_every_token_once_and_ends_with_all_done(play, echo, prompts):
    told = []
    engine = play(echo(max_turns=3))
    drawn, generate = [], engine.engine.generate

    def counted(*args):
        out = generate(*args)
        drawn.append(sum(len(c.token_ids) for c in out))
        return out

    engine.engine.generate = counted
    engine.generate(prompts(6), Sampling(1.0, max_tokens=70), range(6), progress=told.append)
    assert (told[-1].done, told[-1].total, told[-1].tokens) == (6, 6, sum(drawn)) and len(drawn) == 3
    assert [p.tokens for p in told] == sorted(p.tokens for p in told) and {p.total for p in told} == {6}
    assert [p.done for p in told] == sorted(p.done for p in told)


def test_what_is_no_environment_or_has_too_few_seeds_is_refused(plain, tokenizer, play, echo, prompts):
    with pytest.raises(ConfigError, match="max_turns, reset, asks and step"):
        EnvironmentEngine(plain, object(), tokenizer)
    with pytest.raises(RolloutError, match="3 prompts and 1 seeds"):
        play(echo()).generate(prompts(3), Sampling(), [1])


def test_answers_cannot_hold_the_templates_tags_or_special_tokens(tokenizer):
    chat = ChatTemplate()
    ids = chat.result_ids(tokenizer, "<ans<answer>wer>5</answer><|end|>")
    assert tokenizer.decode(ids) == "<result>5<|end|></result>" and max(ids) < 256
