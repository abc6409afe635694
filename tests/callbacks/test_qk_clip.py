"""QK-clip: what it measures against every pair's logit, what it scales, and when."""

import lightning as L
import pytest
import torch

from lit_reason.callbacks import QKClip
from lit_reason.callbacks.qk_clip import SHARPNESS, clip_heads, max_logits
from lit_reason.errors import ConfigError
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.models.attention import causal
from lit_reason.models.packing import pack
from lit_reason.models.rope import rope_table
from lit_reason.optim import Muon

SHAPE = {
    "vocab_size": 40, "width": 32, "depth": 2, "heads": 3, "kv_lora_rank": 12, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 5, "ffn_width": 48, "first_dense": 2, "max_seq_len": 48,
    "init_gain": 2.5, "base": Base(width=32, depth=2),
}  # fmt: skip


def make_model(q_lora_rank=None, seed=0):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**SHAPE, q_lora_rank=q_lora_rank))


def logits_of(attn, x_BTD, rotation):
    """(B, H, T, T) scores of every causal pair, from MLA's parts; -inf where a key is in the future."""
    q = torch.cat(attn._queries(x_BTD, rotation), dim=-1)
    latent, key_rope = attn._latents(x_BTD, rotation)
    k_nope = attn.kv_b(latent).unflatten(-1, (attn.heads, -1))[..., : attn.nope]
    k = torch.cat((k_nope, key_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * attn.scale
    return scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)


class Watched(L.LightningModule):
    """Plain next-token training; keeps each batch's first-layer logits per head, as in the forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.largest, self.logged = model, [], []

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        with torch.no_grad():
            block = self.model.blocks[0]
            rotation = rope_table(self.model.config, ids.device)[: ids.shape[1] - 1]
            logits = logits_of(block.attn, block.attn_norm(self.model.embed(ids[:, :-1])), rotation)
            self.largest.append(logits.amax((0, 2, 3)))
        return torch.nn.functional.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def on_train_batch_end(self, *args):
        self.logged.append({k: float(v) for k, v in self.trainer.logged_metrics.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model, callbacks, tmp_path, steps=1, accumulate=1):
    module = Watched(model)
    ids = torch.randint(0, 40, (16, 14), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=2)
    L.Trainer(
        default_root_dir=tmp_path, max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=callbacks, log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    ).fit(module, loader)  # fmt: skip
    return module


@pytest.mark.parametrize("size", [1.0, 10.0])
def test_the_largest_logit_is_found_without_the_scores(size):
    torch.manual_seed(0)
    q, k = size * torch.randn(2, 30, 3, 8), torch.randn(2, 30, 3, 8)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.3
    exact = (scores + torch.full((30, 30), float("-inf")).triu(1)).amax((0, 2, 3))
    below = exact - max_logits(q, k, 0.3, causal)
    bound = torch.log(torch.tensor(30.0)) / SHARPNESS  # derived in its docstring
    assert below.min() > -1e-4 and below.max() < bound


def test_a_packed_batch_is_measured_per_sequence():
    """Pairs of tokens of different rows are no pairs: the measurement goes through the batch's own attention."""
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (4, 9))
    ids[1, :4] = ids[0, :4]  # a shared prompt
    counts = torch.zeros(4, 9, dtype=torch.bool)
    counts[:, 3:] = True
    packed = pack(ids, counts)
    table_q, table_k = 30 * torch.randn(40, 2, 8), torch.randn(40, 2, 8)  # a token's query and key, whatever its place
    scores = torch.einsum("bthd,bshd->bhts", table_q[ids], table_k[ids]) * 0.3
    exact = (scores + torch.full((9, 9), float("-inf")).triu(1)).amax((0, 2, 3))
    measured = max_logits(table_q[packed.ids_N], table_k[packed.ids_N], 0.3, packed.attention(torch.float32))
    torch.testing.assert_close(measured, exact, atol=0.14, rtol=0)  # log(9) / SHARPNESS
    across = torch.einsum("nhd,mhd->hnm", table_q[packed.ids_N], table_k[packed.ids_N]).amax((1, 2)) * 0.3
    assert (across > exact + 1).any()


@pytest.mark.parametrize("q_lora_rank", [None, 7])
def test_a_heads_logits_are_multiplied_by_its_factor_and_nothing_else_changes(q_lora_rank):
    model = make_model(q_lora_rank)
    attn, x = model.blocks[0].attn, torch.randn(2, 9, 32)
    rotation = torch.polar(torch.ones(9, 2), torch.randn(9, 2))
    finite = torch.ones(9, 9).tril().bool()
    before = logits_of(attn, x, rotation)[..., finite]
    kept = {name: p.detach().clone() for name, p in attn.named_parameters()}
    factor = torch.tensor([1.0, 0.25, 0.6])
    clip_heads(attn, factor)
    after = logits_of(attn, x, rotation)[..., finite]
    torch.testing.assert_close(after, before * factor[:, None], atol=1e-5, rtol=1e-5)
    q = "q.weight" if q_lora_rank is None else "q.2.weight"
    changed = {name for name, p in attn.named_parameters() if not torch.equal(p, kept[name])}
    assert changed == {q, "kv_b.weight"}  # not kv_a: its rotary key is every head's
    values = attn.kv_b.weight.view(3, 11, 12)[:, 6:]
    assert torch.equal(values, kept["kv_b.weight"].view(3, 11, 12)[:, 6:])
    ratio = (attn.get_parameter(q) / kept[q]).view(3, 10, -1)
    torch.testing.assert_close(ratio[1, :6], torch.full_like(ratio[1, :6], 0.5))  # root of 1/4
    torch.testing.assert_close(ratio[1, 6:], torch.full_like(ratio[1, 6:], 0.25))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_heads_above_tau_are_clipped_after_the_step(accumulate, tmp_path):
    plain = fit(make_model(), [], tmp_path, accumulate=accumulate)
    largest = torch.stack(plain.largest).amax(0)  # of all micro-batches, by the weights before the step
    tau = float(largest.sort().values[1]) - 0.3  # two of the first layer's three heads are above
    clipped = fit(make_model(), [QKClip(tau=tau)], tmp_path, accumulate=accumulate)
    attn = plain.model.blocks[0].attn
    clip_heads(attn, torch.where(largest > tau, tau / largest, 1.0))
    # the measurement is at most log(13) / SHARPNESS too low
    moved = clipped.model.blocks[0].attn
    torch.testing.assert_close(moved.q.weight, attn.q.weight, rtol=0.16 / tau, atol=1e-6)
    torch.testing.assert_close(moved.kv_b.weight, attn.kv_b.weight, rtol=0.16 / tau, atol=1e-6)
    assert torch.equal(moved.kv_a.weight, attn.kv_a.weight)
    assert clipped.logged[-1]["attention/clipped_heads"] >= 2
    assert clipped.logged[-1]["attention/max_logit"] > tau
    assert not any(m._forward_pre_hooks for m in clipped.model.modules())


def test_nothing_moves_below_tau(tmp_path):
    plain, watched = fit(make_model(), [], tmp_path, steps=3), fit(make_model(), [QKClip()], tmp_path, steps=3)
    for p, q in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert watched.logged[-1]["attention/clipped_heads"] == 0


class SavesEarly(L.Callback):
    """Sees the weights in the first hook after a step, as a callback that saves them would."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights = {name: p.detach().clone() for name, p in pl_module.model.named_parameters()}


def test_no_callback_sees_the_weights_between_step_and_clip(tmp_path):
    early = SavesEarly()
    module = fit(make_model(), [early, QKClip(tau=0.5)], tmp_path)
    assert module.logged[-1]["attention/clipped_heads"] > 0
    for name, p in module.model.named_parameters():
        assert torch.equal(p, early.weights[name]), name


def test_with_the_composite_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(Watched, "configure_optimizers", lambda self: Muon(lr=0.02).build(self.model, 4)[0])
    module = fit(make_model(), [QKClip(tau=0.5)], tmp_path, steps=3)
    assert all(logged["attention/clipped_heads"] > 0 for logged in module.logged)
    assert module.largest[-1].max() < 0.5 * module.largest[0].max()


def test_only_every_nth_step_is_measured(tmp_path):
    callback = QKClip(every_n_steps=2)
    calls = []
    watch = callback._watch
    callback._watch = lambda *args: calls.append(replaced := watch(*args)) or replaced
    fit(make_model(), [callback], tmp_path, steps=4)
    assert [call is not None for call in calls] == [True, True, False, False] * 2  # two layers a step


def test_frozen_or_foreign_models_are_left_alone(tmp_path):
    model = make_model()
    model.blocks.requires_grad_(False)
    with pytest.warns(UserWarning, match="QKClip found no .*MLA with trainable weights"):
        fit(model, [QKClip(tau=1e-3)], tmp_path)
    kept = make_model()
    assert torch.equal(model.blocks[0].attn.kv_b.weight, kept.blocks[0].attn.kv_b.weight)


def test_wrong_values():
    with pytest.raises(ConfigError, match="tau=0; valid: a number above 0"):
        QKClip(tau=0)
    with pytest.raises(ConfigError, match="every_n_steps=0; valid"):
        QKClip(every_n_steps=0)
