"""One optimizer out of several: its groups, schedules, closures, and an exact resume of every recipe."""

import io

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lit_reason.optim import SOAP, AdamMini, Composite, MarsM, Muon, Shampoo
from lit_reason.optim.composite import MatrixRule

RECIPES = {
    "muon": lambda: Muon(lr=0.02, warmup_steps=2, schedule="cosine", weight_decay=0.1),
    "mars_m": lambda: MarsM(lr=0.02, warmup_steps=2, schedule="cosine"),
    "soap": lambda: SOAP(lr=0.01, warmup_steps=2, precondition_every=2),
    "shampoo": lambda: Shampoo(lr=0.1, schedule="linear", precondition_every=2),
    "adam_mini": lambda: AdamMini(lr=0.01, schedule="linear"),
}
NEEDS_LIBRARY = ("soap", "shampoo")


@pytest.fixture(params=RECIPES)
def recipe(request):
    if request.param in NEEDS_LIBRARY:
        pytest.importorskip("pytorch_optimizer")
    return RECIPES[request.param]()


class Run:
    """A model, its optimizer and schedule, and steps whose gradients depend on the step alone."""

    def __init__(self, model, recipe, set_gradients):
        self.model, self.set_gradients = model, set_gradients
        self.optimizer, self.scheduler = recipe.build(model, 12)

    def train(self, start, stop):
        for step in range(start, stop):
            self.set_gradients(self.model, step)
            self.optimizer.step()
            self.scheduler.step()

    def save(self):
        file = io.BytesIO()
        torch.save([x.state_dict() for x in (self.model, self.optimizer, self.scheduler)], file)
        file.seek(0)
        return file

    def load(self, file):
        states = torch.load(file, weights_only=True)  # no object of ours or of a library in it
        for x, state in zip((self.model, self.optimizer, self.scheduler), states, strict=True):
            x.load_state_dict(state)


def test_stop_and_resume_is_bit_identical(recipe, make_model, set_gradients):
    straight = Run(make_model(), recipe, set_gradients)
    straight.train(0, 5)
    saved = straight.save()
    straight.train(5, 10)
    resumed = Run(make_model(seed=1), recipe, set_gradients)
    resumed.train(0, 1)  # states of its own, which must go
    resumed.load(saved)
    resumed.train(5, 10)
    for (name, p), q in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    again, first = resumed.optimizer.state_dict(), straight.optimizer.state_dict()
    assert again["param_groups"] == first["param_groups"]


def test_a_fresh_optimizer_after_a_stop_would_differ(recipe, make_model, set_gradients):
    """What makes the test above bite: every recipe has a state that matters."""
    straight = Run(make_model(), recipe, set_gradients)
    straight.train(0, 5)
    forgetful = Run(make_model(), recipe, set_gradients)
    forgetful.model.load_state_dict(straight.model.state_dict())
    straight.train(5, 10)
    forgetful.train(5, 10)
    pairs = zip(straight.model.named_parameters(), forgetful.model.parameters(), strict=True)
    same = [name for (name, p), q in pairs if torch.equal(p, q)]
    assert same == []


def test_every_part_sees_the_schedule(recipe, make_model):
    optimizer, scheduler = recipe.build(make_model(), 12)
    optimizer.step()
    scheduler.step()
    for part in optimizer.parts:
        for group in part.param_groups:
            assert any(group is own for own in optimizer.param_groups)
            assert group["lr"] == pytest.approx(group["initial_lr"] * scheduler.lr_lambdas[0](1))
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)


def test_no_step_without_a_gradient(recipe, make_model, set_gradients):
    """A frozen layer, e.g. multi-token prediction in RL, has no gradient: nothing of it may move or fail."""
    model = make_model()
    model.blocks[1].requires_grad_(False)
    unused = model.blocks[0].attn.out.weight
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, _ = recipe.build(model, 12)
    for step in range(3):
        set_gradients(model, step)
        unused.grad = None
        optimizer.step()
    for name, p in model.named_parameters():
        stays = name.startswith("blocks.1.") or p is unused
        assert torch.equal(p, before[name]) == stays, name


def test_a_closure_is_called_once_with_gradients_on(make_model):
    model = make_model()
    optimizer, _ = Muon().build(model, 12)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = model(torch.tensor([[1, 2, 3]])).logsumexp(-1).mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and calls == [True]


def test_a_new_group_is_refused(make_model):
    optimizer, _ = Muon().build(make_model(), 12)
    with pytest.raises(RuntimeError, match="takes no new group"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})


def test_a_model_without_matrices_is_adamw_alone():
    optimizer, _ = Muon(adamw_lr=0.1).build(torch.nn.Embedding(3, 2), 12)
    assert isinstance(optimizer, Composite) and len(optimizer.parts) == 1


class Trained(L.LightningModule):
    def __init__(self, model, recipe):
        super().__init__()
        self.model, self.recipe = model, recipe
        self.norms, self.losses = [], []

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        loss = F.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item())

    def configure_optimizers(self):
        optimizer, scheduler = self.recipe.build(self.model, 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module, tmp_path, steps, ckpt_path=None):
    ids = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4)  # one batch an epoch
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_steps=steps, accelerator="cpu", logger=False, gradient_clip_val=0.25,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_lightning_clips_schedules_and_resumes_it(name, make_model, tmp_path):
    if name in NEEDS_LIBRARY:
        pytest.importorskip("pytorch_optimizer")
    straight = Trained(make_model(), RECIPES[name]())
    fit(straight, tmp_path, steps=6)
    assert len(straight.norms) == 6 and all(norm <= 0.2501 for norm in straight.norms)
    stopped = Trained(make_model(), RECIPES[name]())
    fit(stopped, tmp_path, steps=3).save_checkpoint(tmp_path / "at3.ckpt")
    resumed = Trained(make_model(seed=1), RECIPES[name]())
    fit(resumed, tmp_path, steps=6, ckpt_path=tmp_path / "at3.ckpt")
    assert resumed.losses == straight.losses[3:]
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_rule_without_an_update_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        MatrixRule([{"params": [torch.nn.Parameter(torch.ones(2, 2))]}], {"lr": 1.0}, {})
