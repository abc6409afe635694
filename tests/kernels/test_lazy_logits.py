"""Logits that are not there against those that are: values, gradients, and that nothing of their size is made."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lit_kernels.lazy_logits import LazyLogits
from lit_kernels.logprobs import TILE
from torch.utils._python_dispatch import TorchDispatchMode

B, T, V, D = 3, 5, 11, 4
ROWS = torch.tensor([2, 0])
MASK = torch.arange(B * T).view(B, T) % 4 > 0


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(TILE, "cpu", (3, 4))


def inputs(dtype=torch.float64, shape=(B, T)):
    draw = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(*n, D, generator=draw, dtype=torch.float64) for n in (shape, (V,)))
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def target(shape=(B, T), ignored=True):
    labels = torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))
    return labels.where(torch.arange(labels.numel()).view(shape) % 3 > 0, -100) if ignored else labels


def both(function, dtype=torch.float64, shape=(B, T)):
    """(result, gradients) of lazy and of plain logits."""
    found = []
    for make in (LazyLogits, F.linear):
        states, weight = inputs(dtype, shape)
        out = function(make(states, weight))
        total = out.materialise() if isinstance(out, LazyLogits) else out
        if total.requires_grad:
            (total.double() * torch.arange(1, total.numel() + 1).view(total.shape).double().cos()).sum().backward()
        found.append((out, states.grad, weight.grad))
    return found


def same(found, exact=False, **tolerance):
    tolerance = tolerance or {"atol": 1e-12, "rtol": 1e-12}
    (got, *gradients), (right, *expected) = found
    got = got.materialise() if isinstance(got, LazyLogits) else got
    assert got.dtype == right.dtype and got.shape == right.shape and got.requires_grad == right.requires_grad
    assert (got.equal(right)) if exact else torch.allclose(got, right, equal_nan=True, **tolerance)
    for a, b in zip(gradients, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, **tolerance))


STAY = {
    "view": lambda x: x.view(-1, V),
    "view of a size": lambda x: x.view((B * T, V)),
    "reshape": lambda x: x.reshape(T, B, V),
    "torch.reshape": lambda x: torch.reshape(x, (1, -1, V)),
    "flatten": lambda x: x.flatten(0, 1),
    "torch.flatten": lambda x: torch.flatten(x, end_dim=-2),
    "all but the last": lambda x: x[..., :-1, :],
    "the same": lambda x: x[:, :-1],
    "one row": lambda x: x[0],
    "one token": lambda x: x[:, -1, :],
    "two numbers": lambda x: x[0, -1],
    "rows": lambda x: x[ROWS],
    "rows of a column": lambda x: x[ROWS, 1],
    "a mask": lambda x: x[MASK],
    "a mask, whole": lambda x: x[MASK, :],
    "dots": lambda x: x[1, ...],
    "contiguous": lambda x: x[:, 1:].contiguous(),
    "to its dtype": lambda x: x.to(x.dtype).to("cpu"),
    "several": lambda x: x[:2, 1:].flatten(0, 1)[3:5].view(1, 2, V),
}
LOOK = {
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: x.softmax(-1),
    "F.log_softmax": lambda x: F.log_softmax(x, -1),
    "division": lambda x: x / 0.7,
    "division in place": lambda x: x.div_(0.7),
    "the operator": lambda x: x.__itruediv__(2),
    "reflected": lambda x: 2 - x,
    "a token": lambda x: x[..., 3],
    "tokens": lambda x: x[:, :, 2:5],
    "tokens of flat rows": lambda x: x.flatten(0, 1)[:, :7],
    "a new dimension": lambda x: x[..., None],
    "a list": lambda x: x[[0, 2]],
    "a mask of all": lambda x: x[x > 0],
    "nothing": lambda x: x[()],
    "view across rows": lambda x: x.view(T, V, B),
    "transpose": lambda x: x.transpose(1, 2),
    "cat": lambda x: torch.cat([x, x]),
    "where": lambda x: torch.where(MASK[..., None], x, 0.0),
    "gather": lambda x: x.gather(-1, target(ignored=False)[..., None]),
    "unbind": lambda x: next(iter(x)),
    "max": lambda x: torch.max(x, -1).values,
    "narrower": lambda x: x.to(torch.bfloat16),
    "clone": lambda x: x.clone(),
    "a copy": lambda x: x.to(x.dtype, copy=True),
    "einsum": lambda x: torch.einsum("btv,btv->bt", x, x),
    "of another": lambda x: torch.ones(V, dtype=x.dtype) @ x.flatten(0, 1).T,
    "data": lambda x: x.data,
    "assigned": lambda x: (x.__setitem__((0, 0), 0.0), x)[1],
}


@pytest.mark.parametrize("name", STAY)
def test_rows_are_arranged_without_logits(name):
    found = both(STAY[name])
    assert type(found[0][0]) is LazyLogits
    assert (found[0][0].shape, found[0][0].dtype) == (found[1][0].shape, found[1][0].dtype)
    same(found)


@pytest.mark.parametrize("name", LOOK)
def test_anything_else_is_as_of_plain_logits(name):
    found = both(LOOK[name])
    assert type(found[0][0]) is torch.Tensor or name == "assigned"
    same(found, exact=True)


def test_what_can_be_told_without_logits():
    states, weight = inputs()
    lazy, plain = LazyLogits(states, weight), F.linear(states, weight)
    for ask in (
        lambda x: (x.shape, x.size(), x.size(-1), x.dtype, x.device, x.layout, x.ndim, x.dim(), x.numel(), len(x)),
        lambda x: (
            x.requires_grad,
            x.is_leaf,
            x.grad_fn is None,
            x._base,
            x.is_cuda,
            x.is_sparse,
            x.itemsize,
            x.nbytes,
        ),
        lambda x: (x.stride(), x.is_contiguous(), x.is_floating_point(), torch.is_floating_point(x), torch.numel(x)),
        lambda x: (isinstance(x, torch.Tensor), torch.is_tensor(x), x.is_inference(), x.get_device(), x.is_complex()),
    ):
        assert ask(lazy) == ask(plain)
    assert hash(lazy) == id(lazy) and lazy.kept is None


def test_computed_once_and_kept():
    lazy = LazyLogits(*inputs())
    assert str(lazy) == str(F.linear(*inputs()))
    kept = lazy.materialise()
    assert lazy.materialise() is kept and type(lazy[0]) is type(lazy.float()) is torch.Tensor
    assert torch.equal(copy.deepcopy(LazyLogits(*inputs()).detach()), kept)


def test_halves_widen_and_keep_their_rounding():
    for dtype in (torch.bfloat16, torch.float16):
        found = both(lambda x: x.float()[:, 1:], dtype)
        assert type(found[0][0]) is LazyLogits and found[0][0].dtype == torch.float32
        same(found, atol=1e-2, rtol=1e-2)
        assert torch.equal(found[0][0].materialise(), found[1][0])
    assert type(LazyLogits(*inputs(torch.bfloat16)).to(torch.float16)) is torch.Tensor


def losses(reduction="mean", ignored=True, **settings):
    return lambda x: F.cross_entropy(x.view(-1, V), target(ignored=ignored).view(-1), reduction=reduction, **settings)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", [{}, {"ignored": False}, {"ignore_index": 4, "ignored": False}], ids=str)
def test_cross_entropy(reduction, settings):
    same(both(losses(reduction, **settings)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_where_nothing_counts(reduction):
    ignored = torch.full((B * T,), -100)
    found = both(lambda x: F.cross_entropy(x.view(-1, V), ignored, reduction=reduction))
    same(found)
    assert not found[0][1].any() and not found[0][2].any()


def test_cross_entropy_of_one_token_and_by_the_module():
    same(both(lambda x: F.cross_entropy(x[0, 0], torch.tensor(3))))
    same(both(lambda x: torch.nn.CrossEntropyLoss()(x[:, 2], target()[:, 2])))
    same(both(lambda x: F.cross_entropy(input=x[:, 2], target=target()[:, 2])))


@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_of_halves_has_torchs_dtype(autocast):
    for function in (losses(), lambda x: losses()(x.float())):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = both(function, torch.bfloat16)
        same(found, atol=0.02, rtol=0.02)


def test_autocast_is_that_of_the_moment_when_they_were_made():
    found = []
    for make in (LazyLogits, F.linear):
        states, weight = inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            logits = make(states, weight)
        loss = losses()(logits.float())
        loss.backward()
        found.append((loss, states.grad, weight.grad))
        assert logits.dtype == torch.bfloat16 and states.grad.dtype == torch.float32
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)  # rounded to bfloat16, both
    same(found, atol=1e-2, rtol=1e-2)
    states, weight = inputs(torch.float32)
    exact = losses()(F.linear(states, weight))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses()(LazyLogits(states, weight)), losses()(F.linear(states, weight)))
        lazy = LazyLogits(states.bfloat16(), weight)
        assert lazy.dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        lazy = LazyLogits(states, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert lazy.dtype == torch.float32
        torch.testing.assert_close(losses()(lazy), exact)
    with torch.autocast("cpu", torch.bfloat16):
        pair = LazyLogits(states, weight), F.linear(states, weight)
    assert torch.equal(pair[0].materialise(), pair[1])


UNUSUAL = {
    "smoothing": losses(label_smoothing=0.1),
    "class weights": losses(weight=torch.arange(1.0, V + 1).double()),
    "probabilities": lambda x: F.cross_entropy(x.view(-1, V), torch.full((B * T, V), 1 / V, dtype=torch.float64)),
    "classes second": lambda x: F.cross_entropy(x.transpose(1, 2), target()),
    "the old arguments": losses(size_average=False),
}


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_cross_entropies_are_torchs_own(name):
    same(both(UNUSUAL[name]), exact=True)


def test_targets_that_plain_logits_refuse_are_refused_or_show():
    rows = LazyLogits(*inputs()).view(-1, V)
    with pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(rows, target().view(-1)[1:])
    with pytest.raises(RuntimeError, match="Long"):
        F.cross_entropy(LazyLogits(*inputs()).view(-1, V), target().view(-1).int())
    assert F.cross_entropy(LazyLogits(*inputs()).view(-1, V), torch.full((B * T,), V)).isnan()


class Watched(TorchDispatchMode):
    """The largest number of elements that an operation gave; wrappers and shapes without storage do not count."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and type(x) is not LazyLogits and x.device.type != "meta":
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("make", [LazyLogits, F.linear])
def test_no_tensor_has_the_size_of_logits(make):
    states, weight = inputs(torch.float32, (6, B))
    with Watched() as watched:
        logits = make(states, weight)
        F.cross_entropy(logits.float().view(-1, V), torch.arange(18) % V).backward()
    # 18 rows of states against logits; a tile is 3 x 4
    assert watched.largest == (18 * D if make is LazyLogits else 18 * V)


@pytest.mark.parametrize("items", [None, 7])
def test_the_loss_of_transformers(items):
    causal = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    same(both(lambda x: causal(x, target(), V, num_items_in_batch=items), torch.float32), atol=1e-6, rtol=1e-5)
    states, weight = inputs(torch.float32)
    lazy = LazyLogits(states, weight)
    causal(lazy, target(), V, num_items_in_batch=items)
    assert lazy.kept is None


class Same(torch.autograd.Function):
    """As DDP's sink and full backward hooks: it gets tensors past `__torch_function__`."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_gradients_find_their_way_past_torch_function():
    same(both(lambda x: Same.apply(x).square()))
    same(both(lambda x: Same.apply(x.float()[:, 1:]).float().square(), torch.bfloat16), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_knows_no_torch_function_gets_the_numbers(dtype):
    """As an extension in C++ would. Computed ones are taken."""

    def exp(x):
        with torch._C.DisableTorchFunctionSubclass():
            return x.exp()

    same(both(exp, dtype), exact=True, atol=1e-12 if dtype == torch.float64 else 0.5, rtol=1e-2)
    logits = LazyLogits(*inputs(dtype))
    logits.argmax()
    with torch.no_grad():
        logits.materialise().zero_()
    assert (exp(logits) == 1).all()
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="would change logits"):
        LazyLogits(*inputs()).detach_().mul_(2)


def test_gradients_are_those_of_where_they_were_made():
    states, weight = inputs()
    lazy = LazyLogits(states, weight)
    with torch.no_grad():
        assert not lazy[0].requires_grad and not losses()(lazy).requires_grad and not lazy.exp().requires_grad
    assert lazy.softmax(-1).requires_grad
    with torch.no_grad():
        lazy, part = LazyLogits(states, weight), LazyLogits(*inputs())[0]
    assert not (lazy.requires_grad or lazy[0].requires_grad or losses()(lazy).requires_grad or part.requires_grad)
    assert not lazy.exp().requires_grad
    detached = LazyLogits(states, weight).detach()
    assert type(detached) is LazyLogits and not (detached.requires_grad or detached.exp().requires_grad)
    with torch.inference_mode():
        lazy = LazyLogits(states, weight)
    assert torch.equal(lazy[0], F.linear(states, weight)[0]) and lazy.exp().shape == (B, T, V)
    lazy = LazyLogits(states, weight)
    with torch.inference_mode():
        lazy.argmax(-1)
    lazy.sum().backward()
    assert weight.grad is not None


def test_frozen_weights_and_second_derivatives():
    states, weight = inputs()
    losses()(LazyLogits(states, weight.detach())).backward()
    assert states.grad is not None and weight.grad is None
    found = []
    for make in (LazyLogits, F.linear):
        states, weight = inputs()
        (first,) = torch.autograd.grad(make(states, weight).exp().sum(), states, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (states, weight)))
    assert all(map(torch.allclose, *found))


def test_a_changed_or_freed_weight_is_noticed():
    states, weight = inputs()
    lazy, detached = LazyLogits(states, weight), LazyLogits(states, weight).detach()
    read = LazyLogits(states, weight)
    before = read.materialise().clone()
    with torch.no_grad():
        weight -= 1
    for late in (lazy, detached):
        with pytest.raises(RuntimeError, match=r"changed in place.*Read them before the optimiser's step"):
            late.argmax()
        with pytest.raises(RuntimeError, match="changed in place"):
            losses()(late)
    assert torch.equal(read, before)
    lazy = LazyLogits(states, weight)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"freed before.*Type fully_shard\(..., reshard_after_forward=False\)"):
        lazy.argmax()


CHANGES = {
    "in place": lambda x: x.div_(2),
    "an operator": lambda x: x.__imul__(2),
    "an item": lambda x: x.__setitem__(0, 0.0),
    "a hook": lambda x: x.register_hook(print),
    "its gradient": lambda x: x.retain_grad(),
    "data": lambda x: setattr(x, "data", x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("take", [lambda x: x[1:], lambda x: F.cross_entropy(x, target((B,)))], ids=["slice", "loss"])
@pytest.mark.parametrize("read", [True, False], ids=["read", "not read"])
def test_what_slices_would_not_see_is_refused(take, change, read):
    logits = LazyLogits(*inputs(shape=(B,)))
    take(logits)
    if read:
        logits.argmax()
    with pytest.raises(RuntimeError, match=r"would not see it. Type logits = logits.materialise\(\)"):
        change(logits)


@pytest.mark.parametrize("change", ["in place", "a hook", "its gradient"])
def test_a_gradient_that_goes_round_a_change_is_refused(change):
    logits = LazyLogits(*inputs())
    CHANGES[change](logits)
    logits.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"changed in place, or hooked\. Type"):
        Same.apply(logits).sum().backward()


USES = {"a loss": losses(), "numbers": lambda x: x.exp().sum(), "past torch function": lambda x: Same.apply(x).sum()}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_hooks_of_torch_distributed_run_before_the_weight_is_needed(use, after):
    """FSDP2 gathers the weight by one; here it is zeros until then."""
    states, weight = inputs()
    logits, calls = LazyLogits(states, weight), []

    def gather(grad):
        calls.append(states.grad)
        return grad

    gather.__module__ = "torch.distributed.fsdp"
    if after:
        total = use(logits)
        handle, removed = logits.register_hook(gather), logits.register_hook(gather)
    else:
        handle, removed = logits.register_hook(gather), logits.register_hook(gather)
        total = use(logits)
    removed.remove()
    total.backward(retain_graph=True)
    assert calls and calls[0] is None and states.grad is not None
    handle.remove()
    calls.clear()
    total.backward()
    assert not calls


def test_hooks_get_their_gradient():
    found = []
    for make in (LazyLogits, F.linear):
        logits = make(*inputs())
        logits.register_hook(found.append)
        logits.retain_grad()
        losses()(logits).backward()
        found.append(logits.grad)
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])


def test_what_cannot_be_multiplied_is_refused():
    states, weight = inputs()
    with pytest.raises(ValueError, match=r"got states \(3, 5, 4\) torch.float64, weight \(11, 3\).*valid: \(..., D\)"):
        LazyLogits(states, weight[:, :3])
    with pytest.raises(ValueError, match="of one dtype, or autocast"):
        LazyLogits(states, weight.float())


def test_logits_of_a_special_weight_are_its_own():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            args = [2 * x.as_subclass(torch.Tensor) if type(x) is cls else x for x in args]
            return func(*args, **(kwargs or {}))

    states, weight = inputs()
    logits = LazyLogits(states, weight.detach().as_subclass(Doubled))
    assert type(logits) is torch.Tensor and torch.equal(logits, F.linear(states, 2 * weight))


def test_inside_torch_compile_logits_are_plain():
    labels = target().view(-1)

    def loss(states, weight):
        return F.cross_entropy(LazyLogits(states, weight).view(-1, V), labels)

    found = []
    for function in (torch.compile(loss, backend="eager", fullgraph=True), loss):
        states, weight = inputs()
        out = function(states, weight)
        out.backward()
        found.append((out, states.grad, weight.grad))
    same(found)


class Model(torch.nn.Module):
    def __init__(self, make, inside):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = torch.nn.Embedding(V, D), torch.nn.Linear(D, D)
        self.head = torch.nn.Linear(D, V, bias=False)
        self.head.forward = lambda x: make(x, self.head.weight)
        self.inside = inside

    def forward(self, ids):
        self.logits = self.head(self.body(self.embedding(ids)))
        return {"logits": self.logits, **({"loss": losses()(self.logits)} if self.inside else {})}


def fsdp(**settings):
    def wrap(model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model.body, mesh=mesh)
        return fully_shard(model, mesh=mesh, **settings)

    return wrap


def ddp(**settings):
    return lambda model: torch.nn.parallel.DistributedDataParallel(model, **settings)


@pytest.fixture(scope="module")
def process_group():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .FSDPLinear. returned a view")
@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
@pytest.mark.parametrize(
    ("wrap", "stays"),
    [(ddp(), True), (ddp(find_unused_parameters=True), False), (ddp(static_graph=True), True), (fsdp(), True)],
    ids=["DDP", "DDP's sink", "DDP's static graph", "FSDP2"],
)
def test_distributed_wrappers(process_group, wrap, stays, inside):
    """Two steps: gradients are those of plain logits, and FSDP2's hook gathers weights before they are needed."""
    found = []
    for make in (LazyLogits, F.linear):
        inner = Model(make, inside)
        model = wrap(inner)
        for _ in range(2):
            model.zero_grad()
            out = model(target(ignored=False))
            (out["loss"] if inside else losses()(out["logits"])).backward()
        gradients = [p.grad for p in model.parameters()]
        found.append([g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients])
        if make is LazyLogits:
            assert (inner.logits.kept is None) == stays
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got, right)
