"""The log-prob kernels against float64, and their registration."""

import pytest
import torch
from lit_kernels.dispatch import UnsupportedError
from lit_kernels.logprobs import linear_logprobs, linear_logprobs_reference

kernels = pytest.importorskip("lit_kernels.gpu.logprobs")
SHAPES = [(5, 7, 8), (128, 256, 64), (150, 300, 72), (33, 1100, 48)]


@pytest.fixture(params=["pointers", "descriptors"])
def form(request, monkeypatch):
    """As if on such a GPU: the interpreter runs both."""
    monkeypatch.setattr(kernels, "_is_hopper", lambda device: request.param == "descriptors")
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    real = torch.Tensor.new_empty

    def new_empty(*arguments, **settings):
        made = real(*arguments, **settings)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, float("nan")))


def problem(M, V, D, dtype=torch.bfloat16, size=4.0):
    """Logits of a standard deviation of `size`."""
    draw = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, D, generator=draw) for n in (M, V))
    target = torch.randint(0, V, (M,), generator=draw)
    return (size * D**-0.5 * states).to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def run(function, states, weight, target, temperature, weights=(1.0, -0.3), **settings):
    """Log-probs, entropies and gradients of a loss in which every row counts differently."""
    states, weight = (x.detach().requires_grad_() for x in (states, weight))
    outputs = function(states, weight, target, temperature, **settings)
    rows = torch.arange(1, len(states) + 1).double().cos()
    sum(w * (rows * out).sum() for w, out in zip(weights, outputs, strict=True) if w).backward()
    return *(out.detach() for out in outputs), states.grad, weight.grad


def exact(states, weight, target, temperature, weights=(1.0, -0.3)):
    return run(linear_logprobs_reference, states.double(), weight.double(), target, temperature, weights)


def check(found, right, dtype):
    """Gradients within two roundings of their dtype (the logits' gradient, and the sum), all else of float32 sums."""
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]
    for one, expected in zip(found[:2], right[:2], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), expected, atol=2e-5, rtol=2e-5)
    for one, expected in zip(found[2:], right[2:], strict=True):
        assert one.dtype == dtype
        error = (one.double() - expected).norm() / expected.norm()
        assert error < step, error


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_against_float64(form, poisoned, shape, temperature):
    inputs = problem(*shape)
    check(run(linear_logprobs, *inputs, temperature, backend="triton"), exact(*inputs, temperature), torch.bfloat16)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["log-prob", "entropy"])
def test_gradients_of_one_output(poisoned, weights):
    inputs = problem(20, 50, 32)
    found = run(linear_logprobs, *inputs, 0.7, weights, backend="triton")
    check(found, exact(*inputs, 0.7, weights), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(poisoned, dtype):
    inputs = problem(70, 150, 40, dtype)
    check(run(linear_logprobs, *inputs, 0.7, backend="triton"), exact(*inputs, 0.7), dtype)


def test_parts_of_several_tiles_and_chunks_of_some_columns(form, poisoned, monkeypatch):
    """10 tiles by pointers in parts of 4 and a shorter one, and a buffer of 128 of 1163 columns: with its ends ragged,
    every number is as if there were one part and one chunk."""
    inputs = problem(33, 1163, 24)
    whole = run(linear_logprobs, *inputs, 0.7, backend="triton")
    monkeypatch.setattr(kernels, "BUFFER", 1)
    monkeypatch.setattr(kernels, "WAVES", 1)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 3)
    found = run(linear_logprobs, *inputs, 0.7, backend="triton")
    check(found, exact(*inputs, 0.7), torch.bfloat16)
    torch.testing.assert_close(found[3], whole[3], rtol=2**-7, atol=1e-6)


def test_more_tiles_of_rows_than_go_together(poisoned, monkeypatch):
    monkeypatch.setattr(kernels, "TOGETHER", 2)
    inputs = problem(5 * 128 + 1, 260, 16)
    check(run(linear_logprobs, *inputs, 1.0, backend="triton"), exact(*inputs, 1.0), torch.bfloat16)


def test_float32_weights_under_autocast(poisoned):
    """The products are of bfloat16, the gradients in the dtypes of what they are gradients of."""
    states, weight, target = problem(40, 90, 32, torch.float32)
    rounded = [x.detach().bfloat16().float() for x in (states, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        found = run(linear_logprobs, states, weight, target, 0.7, backend="triton")
    right = exact(*rounded, target, 0.7)
    assert found[2].dtype == found[3].dtype == torch.float32
    check((*found[:2], *(x.bfloat16() for x in found[2:])), right, torch.bfloat16)


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(poisoned, frozen):
    states, weight, target = problem(20, 50, 32)
    right = run(linear_logprobs, states, weight, target, 1.0, backend="triton")
    (states if frozen == "states" else weight).requires_grad_(False)
    logprob, entropy = linear_logprobs(states, weight, target, 1.0, backend="triton")
    ((logprob - 0.3 * entropy) * torch.arange(1, 21).double().cos()).sum().backward()
    got, other = (weight, states) if frozen == "states" else (states, weight)
    assert other.grad is None
    torch.testing.assert_close(got.grad, right[3 if frozen == "states" else 2], rtol=2**-7, atol=1e-6)


def test_log_probs_are_never_positive(form):
    """Where one token has all the probability, and the normaliser is that token's logit but for its rounding."""
    states, weight, _ = problem(200, 600, 32, size=80)
    target = (states @ weight.T).argmax(1)
    for temperature in (1.0, 0.1, 1e-3):
        logprob, entropy = linear_logprobs(states, weight, target, temperature, backend="triton")
        assert (logprob <= 0).all() and (entropy >= 0).all() and (logprob > -1e-6).any()


def test_logits_of_any_size():
    """The largest logit comes last, first, and far below zero; probabilities underflow."""
    states = torch.eye(3, requires_grad=True)
    weight = torch.tensor([[0.0, 900.0, -900.0]] * 4 + [[-300.0, 0.0, -1500.0]] * 400 + [[200.0, 0.0, -990.0]])
    target = torch.tensor([0, 0, 404])
    found = linear_logprobs(states, weight, target, backend="triton")
    torch.testing.assert_close(found, linear_logprobs_reference(states, weight, target), atol=1e-4, rtol=1e-5)
    sum(found).sum().backward()
    assert states.grad.isfinite().all()


def test_what_is_no_token_or_no_number_shows():
    states, weight, _ = problem(4, 300, 16, torch.float32)
    with torch.no_grad():
        weight[280, 3] = float("nan")
        states[:3, 3] = 0
    target = torch.tensor([-100, 300, 7, 7])
    logprob, entropy = linear_logprobs(states, weight.nan_to_num(), target, backend="triton")
    assert logprob.isnan().tolist() == [True, True, False, False] and entropy.isfinite().all()
    logprob, entropy = linear_logprobs(states[3:], weight, target[3:], backend="triton")
    assert logprob.isnan().all() and entropy.isnan().all()


def test_no_rows(form):
    found = run(linear_logprobs, *problem(0, 30, 16), 1.0, backend="triton")
    assert [x.shape for x in found] == [(0,), (0,), (0, 16), (30, 16)] and not found[3].any()


def test_rows_that_are_not_neighbours(form):
    states, weight, target = problem(20, 50, 64)
    apart = [torch.stack([x, x], 1).flatten(1).detach()[:, 7:71] for x in (states, weight)]
    found = linear_logprobs(*apart, target, backend="triton")
    torch.testing.assert_close(found, linear_logprobs(*(x.clone() for x in apart), target, backend="triton"))


def test_from_run_to_run():
    inputs = problem(33, 600, 48)
    first, second = (run(linear_logprobs, *inputs, 1.0, backend="triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_products_of_float64_are_refused():
    inputs = problem(3, 5, 4, torch.float64)
    with pytest.raises(UnsupportedError, match=r"products of torch.float64; valid for Triton: torch.bfloat16.*Type"):
        linear_logprobs(*inputs, backend="triton")


@pytest.mark.parametrize("M", [5, 0])
def test_operations_are_registered_as_torch_wants(M):
    states, weight, target = problem(M, 20, 16, torch.float32)
    operation = torch.ops.lit_kernels.linear_logprobs.default
    if M:
        torch.library.opcheck(operation, (states, weight, target, 0.7, torch.float32))
    _, entropy, normaliser = operation(states.detach(), weight.detach(), target, 0.7, torch.float32)
    for wanted in ((True, True), (True, False), (False, True)):
        grads = (torch.ones(M), torch.ones(M))
        rest = (states.detach(), weight.detach(), target, normaliser, entropy, 0.7, torch.float32, *wanted)
        torch.library.opcheck(torch.ops.lit_kernels.linear_logprobs_backward.default, (*grads, *rest))


def test_compiled_in_one_graph():
    inputs = problem(9, 40, 16)
    compiled = torch.compile(linear_logprobs, backend="aot_eager", fullgraph=True)
    right = run(linear_logprobs, *inputs, 0.7, backend="triton")
    for one, expected in zip(run(compiled, *inputs, 0.7, backend="triton"), right, strict=True):
        assert torch.equal(one, expected)
