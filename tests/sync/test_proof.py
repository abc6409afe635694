"""The proof, on an engine that is a copy of the model with a prefix cache that can be made to lie."""

import copy

import pytest
import torch
from lit_kernels.swap import Swap, put

from lit_reason.data import ByteTokenizer
from lit_reason.errors import ConfigError, EngineDiedError, RolloutError, WeightSyncError
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.models.export import checkpoint_tensors
from lit_reason.models.lora import LoRA, merged_copy
from lit_reason.rollout import BuiltinEngine
from lit_reason.rollout.engine import Held, NextToken, Provable, held_as_is
from lit_reason.sync import Proof, ProvenEngine
from lit_reason.sync.proof import canaries_of

CANARIES = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
BLOCK = 4


def proof_of(canaries, limit=None):
    """A proof with these canaries, not with some made of prompts."""
    proof = Proof(canaries, limit)
    proof._canaries = canaries
    return proof


class Copying:
    """Holds a copy; keeps a prefix cache by blocks of 4 tokens; room for two texts in it."""

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.copy, self.cache, self.number = None, [], -1
        self.flushes, self.extra, self.recovered, self.change = True, {}, None, dict
        self.asleep, self.noise = 0, 0.0

    def push(self, model, version):
        self.copy, self.number = merged_copy(model), version
        if self.flushes:
            self.cache = []

    def version(self):
        return self.number

    def generate(self, prompts, sampling, seeds, sample_idx=None, progress=None):
        self.remember([list(prompt) for prompt in prompts])
        return []

    def prefix_block(self):
        return BLOCK

    def truth(self, model):
        return checkpoint_tensors(model, self.dtype)

    def held(self):
        return self.change(held_as_is(checkpoint_tensors(self.copy, self.dtype)) | self.extra)

    def remember(self, texts):
        self.cache = (self.cache + texts)[-2:]

    @torch.no_grad()
    def next_token(self, prompts, top):
        if self.asleep:
            raise RolloutError("the engine sleeps")
        found = []
        for ids in prompts:
            logprobs = self.copy(torch.tensor([ids]))[0, -1].log_softmax(-1)
            best = logprobs.topk(top)
            cached = BLOCK if any(text[:BLOCK] == list(ids)[:BLOCK] for text in self.cache) else 0
            found.append(
                NextToken(dict(zip(best.indices.tolist(), (best.values + self.noise).tolist(), strict=True)), cached)
            )
        self.remember([list(ids) for ids in prompts])
        return found

    def sleep(self, level):
        self.asleep = level

    def wake(self):
        self.asleep = 0


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=40, width=32, depth=2, heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
            v_head_dim=8, ffn_width=48, experts=4, expert_width=16, max_seq_len=48, base=Base(width=32, depth=2),
        )
    )  # fmt: skip
    for router in model.routers():
        router.bias_E.normal_()
    return model


@pytest.fixture
def engine():
    return Copying()


@pytest.fixture
def proven(engine):
    return ProvenEngine(engine, proof_of(CANARIES))


def step(model, size=1e-3):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)


def edited(name, **changes):
    """`held` with one entry in another way."""

    def change(held):
        one = held[name]
        facts = {"dtype": one.dtype, "shape": one.shape, "digest": one.digest} | changes
        return held | {name: Held(**facts)}

    return change


def test_a_right_push_raises_nothing_and_is_measured(model, engine, proven):
    assert isinstance(engine, Provable)
    for version in range(20):
        proven.push(model, version)
        assert proven.measured["sync/tensors"] == len(list(checkpoint_tensors(model, torch.float32)))
        assert proven.measured["sync/gap"] < 1e-6 and proven.measured["speed/proof_s"] > 0
        assert proven.version() == engine.number == version
        step(model)


class Louder(Swap):
    """A kernel of training that computes something else."""

    def forward(self, x):
        return 50 * super().forward(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_of_training_are_no_fault_of_a_push(model, dtype):
    """Neither for an engine that shares the policy (float32) nor for one with a copy, made after the swap."""
    put(model.blocks[0].ffn.down, Louder)
    engine = ProvenEngine(BuiltinEngine(ByteTokenizer(), dtype=dtype), proof_of(CANARIES))
    engine.push(model, 0)
    assert engine.measured["sync/gap"] < (1e-6 if dtype == "float32" else 0.02)
    assert isinstance(model.blocks[0].ffn.down, Louder)


def test_a_smallest_change_of_one_element_is_named(model, engine, proven):
    proven.push(model, 0)
    with torch.no_grad():
        weight = engine.copy.blocks[1].ffn.experts.down
        weight[2, 3, 4] = torch.nextafter(weight[2, 3, 4], torch.tensor(9.0))
    with pytest.raises(
        WeightSyncError,
        match=r"push of version 0 .* 1 of \d+ .*: model.layers.1.mlp.experts.2.down_proj.weight differs",
    ):
        proven.proof.check(engine, model, 0)


def test_a_forgotten_buffer_is_named(model, engine, proven):
    proven.push(model, 0)
    model.routers()[0].bias_E += 1e-3
    with pytest.raises(WeightSyncError, match=r"e_score_correction_bias differs"):
        proven.proof.check(engine, model, 1)


NAME = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: {n: h for n, h in held.items() if n != NAME}, f"{NAME} is missing"),
        (edited(NAME, dtype="bfloat16"), "is bfloat16, the trainer's float32"),
        (edited(NAME, shape=(2, 2)), r"has shape \(2, 2\), the trainer's \(4,\)"),
        (lambda held: held | {f"{NAME} used": Held("float32", (4,), 7)}, f"1 of \\d+ .*{NAME} used differs"),
    ],
    ids=["missing", "narrower", "shape", "derived copy"],
)
def test_what_is_held_otherwise_is_named(model, engine, proven, change, says):
    engine.change = change
    with pytest.raises(WeightSyncError, match=says):
        proven.push(model, 0)


def test_a_wider_copy_of_the_same_numbers_is_right(model):
    engine = Copying(torch.bfloat16)

    def widened(held):
        tensors = dict(checkpoint_tensors(engine.copy, torch.bfloat16))
        return held_as_is((name, tensor.float()) for name, tensor in tensors.items())

    engine.change = widened
    ProvenEngine(engine, proof_of(CANARIES, limit=1.0)).push(model, 0)


def test_what_no_push_changes_must_not_change(model, engine, proven):
    engine.extra = {"rotary.table": Held("float32", (3,), 1)}
    proven.push(model, 0)
    proven.push(model, 1)
    engine.extra = {"rotary.table": Held("float32", (3,), 2)}
    with pytest.raises(WeightSyncError, match=r"rotary\.table has changed"):
        proven.push(model, 2)


def test_many_faults_are_counted_and_the_first_are_named(model, engine, proven):
    engine.change = lambda held: {}
    with pytest.raises(WeightSyncError, match=r"embed_tokens.weight is missing; .* \.\.\.$"):
        proven.push(model, 0)


def test_adapters_that_were_not_delivered_are_seen_though_the_engine_agrees_with_itself(model, engine, proven):
    """An engine that asks itself what it should hold would pass: the truth is the checkpoint's."""
    LoRA(rank=2).apply(model)
    proven.push(model, 0)  # B = 0: the base itself
    base = copy.deepcopy(engine.copy)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e-4)
    engine.export = lambda model: checkpoint_tensors(base, torch.float32)
    engine.push = lambda model, version: engine.cache.clear()
    with pytest.raises(WeightSyncError, match="does not hold the policy"):
        proven.push(model, 1)


def test_a_skipped_flush_is_seen_however_much_was_generated_since(model, engine, proven):
    engine.flushes = False
    proven.push(model, 0)
    engine.generate([[20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31]], None, [])  # the canaries are out
    with pytest.raises(WeightSyncError, match=r"still had 8 tokens of the canaries in its prefix cache"):
        proven.push(model, 1)


def test_a_cache_that_is_not_used_is_seen(model, engine, proven):
    engine.remember = lambda texts: None
    with pytest.raises(WeightSyncError, match="did not use its prefix cache"):
        proven.push(model, 0)
    engine.prefix_block = lambda: 0  # it has none
    proven.push(model, 1)


def test_other_log_probs_are_seen_though_the_checksums_agree(model, engine, proven):
    engine.noise = 3e-4
    with pytest.raises(
        WeightSyncError, match=r"differ by 0\.0003\d* nats on the median canary \(limit 0\.0001 in float32\)"
    ):
        proven.push(model, 0)
    ProvenEngine(engine, proof_of(CANARIES, limit=1e-3)).push(model, 0)
    engine.noise = float("nan")
    with pytest.raises(WeightSyncError, match="differ by inf"):
        proven.push(model, 1)


def test_a_recovered_engine_is_proven_too(model, engine, proven):
    proven.push(model, 0)
    measured, engine.cache = proven.measured, []
    engine.recovered(engine, model, 0)
    assert proven.measured is not measured
    engine.copy.embed.weight.data += 1
    with pytest.raises(WeightSyncError, match=r"embed_tokens\.weight differs"):
        engine.recovered(engine, model, 0)


def test_waking_with_other_weights_is_seen(model, engine, proven):
    proven.push(model, 0)
    proven.sleep(1)
    step(model)  # the trainer goes on: that is no fault of the engine
    proven.wake()
    proven.sleep(1)
    engine.copy.norm.weight.data[3] += 1
    with pytest.raises(WeightSyncError, match=r"after its sleep .* 1 of \d+ tensors differ: model.norm.weight"):
        proven.wake()
    proven.sleep(2)
    engine.copy.norm.weight.data.zero_()
    proven.wake()  # what was dropped is nothing to compare: `generate` is refused until a push


def test_a_sleeping_or_dead_engine_is_pushed_to(model, engine, proven):
    proven.push(model, 0)
    engine.asleep, push = 1, engine.push
    engine.push = lambda model, version: (engine.wake(), push(model, version))
    proven.push(model, 1)
    assert proven.version() == 1

    def dies(prompts, top):
        engine.next_token = alive
        raise EngineDiedError("gone")

    alive, engine.next_token = engine.next_token, dies
    proven.push(model, 2)
    assert proven.version() == 2


def test_it_passes_everything_else_on(model, engine, proven):
    assert proven.dtype == torch.float32 and proven.generate([], None, []) == []
    with pytest.raises(AttributeError):
        proven.no_such_thing  # noqa: B018


@pytest.mark.parametrize("canaries", [[], [[1], []]])
def test_a_proof_without_canaries_is_refused(canaries):
    with pytest.raises(ConfigError, match="needs prompts"):
        Proof(canaries)


def test_the_models_mode_and_random_state_stay(model, proven):
    state = torch.get_rng_state()
    model.train()
    proven.push(model, 0)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_no_canary_shares_a_block_with_a_prompt_or_another():
    """All prompts begin with the same 30 tokens, as under a system prompt."""
    prompts = [[*range(100, 130), i, i + 1] for i in range(20)]
    for block in (8, 16):
        canaries = canaries_of(prompts, block, context=256, count=8)
        assert len(canaries) == 8 and all(len(ids) == max(48, block + 16) for ids in canaries)
        assert len({tuple(ids[:block]) for ids in [*canaries, prompts[0]]}) == 9
    assert len(canaries_of(prompts[:2], 16, context=40, count=8)[0]) == 39
    assert len(canaries_of(prompts, 128, context=256, count=8)[0]) == 144
    with pytest.raises(ConfigError, match=r"prefix cache has \(64\), the model's context is 64"):
        canaries_of(prompts, 64, context=64, count=8)
