"""Router replay in a policy's update: what is replayed and what is not, its metric, and what it is for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lit_reason.data import ByteTokenizer
from lit_reason.loop.batching import collate, split
from lit_reason.models.packing import pack
from lit_reason.modules import PolicyModule, token_logprobs
from lit_reason.modules.base import Meter
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.rollout import BuiltinEngine, Sampling
from lit_reason.types import Prompt

ALGORITHMS = Path(__file__).parents[2] / "conf" / "algorithm"


@pytest.fixture
def told(round_batch):
    """The batch with any experts for two MoE layers of 4 experts; the rows of a prompt agree on the prompt's."""
    draw = torch.Generator().manual_seed(5)
    B, T = round_batch.input_ids_BT.shape
    experts = torch.rand(B, T, 2, 4, generator=draw).topk(2, dim=-1).indices.to(torch.int16)
    for b in range(B):
        length = 2 + b // 4
        experts[b, :length] = experts[b // 4 * 4, :length]
    round_batch.experts_BTLK = experts
    return round_batch


@pytest.fixture
def build(make_model):
    """`build("grpo")`: a policy of three layers, whose first is dense."""

    def make(algorithm="grpo", lr=1e-3, trunk=None, **kwargs) -> PolicyModule:
        axes = yaml.safe_load((ALGORITHMS / f"{algorithm}.yaml").read_text())
        axes.pop("_target_")
        if trunk is not None:
            axes["critic"] |= {"trunk": trunk}
        model = make_model(depth=3, experts_per_token=2)
        return PolicyModule(model, AdamW(lr=lr), Objective(**axes), **kwargs)

    return make


def own_choice(model, ids_BT):
    seen = []
    hooks = [r.register_forward_hook(lambda m, a, out: seen.append(out.experts_NK)) for r in model.routers()]
    with torch.no_grad():
        model.hidden(ids_BT)
    for hook in hooks:
        hook.remove()
    return torch.stack([x.view(*ids_BT.shape, -1) for x in seen], 2).to(torch.int16)


def test_old_and_new_log_probs_are_replayed_and_the_references_are_not(build, told, micro_batches, fit):
    policy = build(lr=1e-12)  # policy and reference stay equal
    fit(policy, micro_batches(policy, 1))
    with torch.no_grad():
        own = token_logprobs(policy.model, told, 1.0)[0]
        replayed = token_logprobs(policy.model, told, 1.0, told.experts_BTLK)[0]
        new = policy.forward(told)
    assert (own - replayed).abs().max() > 1e-3
    assert torch.equal(policy.old_logprobs(told), replayed) and torch.equal(new.logprobs_BT, replayed)
    torch.testing.assert_close(policy.ref_logprobs(told), own, atol=1e-6, rtol=0)
    policy.replay_routing = False
    assert torch.equal(policy.old_logprobs(told), own) and torch.equal(policy.forward(told).logprobs_BT, own)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_a_critic_on_the_policys_states_reads_those_of_its_replay(build, told, micro_batches, fit, trunk):
    policy = build("ppo", trunk=trunk)
    torch.nn.init.normal_(policy.critic.head.weight)
    fit(policy, micro_batches(policy, 1))
    with torch.no_grad():
        before, at_start = policy.forward(told).values_BT, policy.values(told)
        told.experts_BTLK = None
        without = policy.forward(told).values_BT
    torch.testing.assert_close(at_start, before, atol=1e-6, rtol=0)
    assert ((before - without).abs().max() > 1e-3) == (trunk == "shared")


def test_a_replayed_step_is_the_same_in_any_number_of_micro_batches(build, told, micro_batches, fit):
    steps, shares = {}, {}
    for n in (1, 2, 4, 8):
        policy = build()
        record = fit(policy, micro_batches(policy, n), accumulate=n)
        steps[n], shares[n] = record.steps[0], record.metrics[0]["router/replayed"]
    for n in (2, 4, 8):
        for name, gradient in steps[1].items():
            error = (steps[n][name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
            assert error < 1e-5, (n, name, float(error))
    routers = [gradient for name, gradient in steps[1].items() if "router" in name]
    assert len(routers) == 2 and all(gradient.norm() > 1e-6 for gradient in routers)
    assert shares[1] == pytest.approx(shares[2]) == pytest.approx(shares[4])  # 8 cut the groups: prompts count twice


def test_the_share_of_replayed_choices_that_differ(build, told, micro_batches, fit):
    """The last layer's experts alone are others, so that the routers' own choice is that of a plain forward."""
    policy = build()
    own = own_choice(policy.model, told.input_ids_BT)
    told.experts_BTLK[:, :, 0] = own[:, :, 0]
    told.experts_BTLK[7] = -1
    counts_BT = told.mask_BT > 0
    given, chosen = (pack(told.input_ids_BT, counts_BT, x).experts_NLK for x in (told.experts_BTLK, own))
    known = (given >= 0).all(-1)
    differ = [set(a) != set(b) for a, b in zip(given[known].tolist(), chosen[known].tolist(), strict=True)]
    assert not known.all() and any(differ) and not all(differ)
    share = sum(differ) / len(differ)
    logged = fit(policy, micro_batches(policy, 4), accumulate=4).metrics[0]
    assert logged["router/replayed"] == pytest.approx(share)
    silent = build(replay_routing=False)
    assert "router/replayed" not in fit(silent, micro_batches(silent, 1)).metrics[0]
    told.experts_BTLK.fill_(-1)
    assert (
        fit(build(), split(told, range(16), torch.arange(4).repeat_interleave(4), 1)).metrics[0]["router/replayed"] == 0
    )


def test_the_meter_weighs_a_share_by_its_own_counts():
    """10 of 40 and 1 of 2 are 11 of 42, whatever the tokens of the loss; a batch without tokens has no say."""
    meter = Meter()
    for counts, tokens in (([10.0, 40.0], 7.0), ([1.0, 2.0], 30.0)):
        meter.add({"router/replayed": torch.tensor(counts) / tokens}, {}, tokens)
    meter.add({"router/replayed": torch.tensor([3.0, 3.0]) / 0.0}, {}, 0.0)
    assert meter.take()["router/replayed"] == pytest.approx(11 / 42)


@pytest.fixture
def bfloat16_rollouts(make_model):
    """A float32 model and 16 completions of a bfloat16 engine, with the experts that prompt and tokens took in it."""
    model = make_model(vocab_size=260, width=64, depth=4, experts=16, experts_per_token=2, max_seq_len=96).eval()
    engine = BuiltinEngine(ByteTokenizer(), dtype="bfloat16")
    engine.push(model, 0)
    draw = torch.Generator().manual_seed(1)
    prompts = [
        Prompt(f"{i:016x}", "", "", "", (i, *torch.randint(0, 250, (8,), generator=draw).tolist())) for i in range(16)
    ]
    completions = []
    for i, prompt in enumerate(prompts):
        seen = [[] for _ in engine.model.routers()]
        hooks = [
            router.register_forward_hook(lambda m, a, out, calls=calls: calls.append(out.experts_NK.clone()))
            for router, calls in zip(engine.model.routers(), seen, strict=True)
        ]
        (completion,) = engine.generate([prompt], Sampling(temperature=1.0, max_tokens=48), [i])
        for hook in hooks:
            hook.remove()
        experts_SLK = torch.stack([torch.cat(calls) for calls in seen], 1).to(torch.int16)
        completions.append(replace(completion, experts_SLK=experts_SLK))
    return model, engine, collate(prompts, completions, 48, 0)


@torch.no_grad()
def test_replay_takes_the_gap_of_a_bfloat16_engine_from_the_tokens_whose_routing_flipped(bfloat16_rollouts):
    model, engine, batch = bfloat16_rollouts
    on_BT, known_BT = batch.mask_BT > 0, batch.experts_BTLK[:, :, 0, 0] >= 0

    def flipped(model):
        own = own_choice(model, batch.input_ids_BT)
        return (own.sort(-1).values != batch.experts_BTLK.sort(-1).values).any((-2, -1)) & known_BT

    def gap(experts, where):
        return (token_logprobs(model, batch, 1.0, experts)[0] - batch.rollout_logprobs_BT)[where].abs().mean().item()

    flipped_BT = flipped(model) & on_BT
    assert flipped_BT.sum() >= 10
    # Bfloat16 alone leaves about 0.01; a flip adds the difference of two experts.
    plain, replayed = gap(None, flipped_BT), gap(batch.experts_BTLK, flipped_BT)
    assert replayed < plain / 5 and replayed < 0.02
    assert gap(batch.experts_BTLK, on_BT) < gap(None, on_BT)
    # Prompts are read at once, completions token by token: a bfloat16 forward over all of it chooses other experts than
    # the engine did, so only what was chosen while generating may be replayed.
    assert (flipped(engine.model) & on_BT).any()
    prompt_BT = torch.arange(on_BT.shape[1]) <= on_BT.int().argmax(1, keepdim=True)
    touched_BT = on_BT & (flipped(model) & prompt_BT).any(1, keepdim=True)  # what was written after such a prompt
    assert touched_BT.any()
    without = gap(batch.experts_BTLK.masked_fill(prompt_BT[..., None, None], -1), touched_BT)
    assert gap(batch.experts_BTLK, touched_BT) < without
