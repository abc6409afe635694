"""Grouped products whose operands are FP8, forward and backward, as DeepSeek-V3 trains its experts (2412.19437 section
3.3); `linear.py` for experts.

    y  = x w_e^T      rows of x           x  blocks of each w_e
    dx = dy w_e       rows of dy          x  blocks of w_e^T, the same numbers
    dw_e = dy^T x     columns of dy       x  columns of x: scales along the rows of an expert, which are summed over

No block of a column may hold rows of two experts. So "by expert" means transposed, (D, P): every expert's rows start
at a block of their own, and zeros fill its last one. Rows 0 1 | 2 of two experts in blocks of 2 (128 here):

    x_SD rows    0 1 2 nobody's           by expert, P    0 1 2 0 0 0 0 0

p = (S + 127 (E + 1)) // 128 blocks are enough for any division of the S rows, and known without looking at it.

    triton     ours, one kernel for each product: GPUs with FP8 tensor cores (8.9 and above)
    torch      a loop of `F.scaled_mm` over the experts: Hopper and CUDA 12.9 or newer
    emulate    that loop in float32, on any device: the numbers without the speed
    auto       torch or triton, never emulated

Name and shape for `dispatch`: "fp8_grouped_mm", (E, S, F, D). Rows of nobody are zero in y and dx, and an expert
without rows has dw of zeros.

Shapes: S rows sorted by expert, E experts, F outputs and D inputs of each; d, f, p: blocks of 128; P = 128 p."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_kernels.dispatch import UnsupportedError, choose, missing_for_triton_fp8
from lit_kernels.fp8 import BLOCK, E4M3, Quantised, Scales, quantise_blocks_reference, quantise_rows_reference
from lit_kernels.gemm import gemm, missing_for_torch
from lit_kernels.linear import unsupported


def fp8_grouped_mm(
    x_SD: Tensor,
    w_EFD: Tensor,
    ends_E: Tensor,
    *,
    backend: str = "auto",
    kind: Scales = "float",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x w_e^T for the rows of each expert e, (S, F), and its gradients, all in FP8.

    Args:
        x_SD: rows of expert 0, then of expert 1, ...
        ends_E: int32, where each expert's rows end.
        kind: of the scales, "float" or "power of two".
        dtype: of y; None: x's.

    Raises:
        UnsupportedError: the products cannot run here.
        ValueError: D or F is no multiple of 16, or does not fit.

    Example::

        y = fp8_grouped_mm(x, experts.gate_up, ends, backend="emulate")
    """
    (S, D), (E, F_, _) = x_SD.shape, w_EFD.shape
    if w_EFD.shape[2] != D or ends_E.shape != (E,):
        got = f"x {tuple(x_SD.shape)}, w {tuple(w_EFD.shape)}, ends {tuple(ends_E.shape)}"
        raise ValueError(f"fp8_grouped_mm got {got}; valid: (S, D), (E, F, D), (E,)")
    if reason := unsupported(F_, D):
        raise ValueError(f"fp8_grouped_mm got experts (F, D) of which {reason}. Type lit_kernels.grouped.grouped_mm")
    backend = _chosen(backend, x_SD.device, (E, S, F_, D))
    return _Grouped.apply(x_SD, w_EFD, ends_E, dtype or x_SD.dtype, backend, kind)


def _chosen(backend: str, device: torch.device, shape: tuple[int, int, int, int]) -> str:
    """ "emulate", "torch" or "triton"."""
    if backend == "emulate":
        return backend
    missing = {"torch": missing_for_torch(device, *shape[2:]), "triton": missing_for_triton_fp8(device)}
    found = choose("fp8_grouped_mm", backend, device, shape).backend
    if backend == "auto":
        if missing[found]:
            found = "torch" if found == "triton" else "triton"
        if missing[found] or device.type != "cuda":  # Triton's interpreter is for tests
            reasons = " and ".join(filter(None, missing.values()))
            raise UnsupportedError(f"fp8_grouped_mm cannot run: {reasons}. Type backend='emulate' for its numbers")
    elif missing[found]:
        raise UnsupportedError(
            f"fp8_grouped_mm got backend={backend!r}, but {missing[found]}. Type backend='auto' or 'emulate'"
        )
    return found


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SD: Tensor, w_EFD: Tensor, ends_E: Tensor, dtype: torch.dtype, backend: str, kind: Scales
    ) -> Tensor:
        ctx.settings = x_SD.dtype, backend, kind
        rows, scales, *by_expert = _by_expert(x_SD.contiguous(), ends_E, kind, backend)
        ctx.save_for_backward(w_EFD, ends_E, *(by_expert if ctx.needs_input_grad[1] else ()))
        w, w_scales = _experts(w_EFD.contiguous(), kind, False, backend)
        return _product(rows, scales, w, w_scales, ends_E, dtype, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SF: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        w_EFD, ends_E, *x_by_expert = ctx.saved_tensors
        x_dtype, backend, kind = ctx.settings
        rows, scales, *by_expert = _by_expert(grad_SF.contiguous(), ends_E, kind, backend)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            w_t, w_scales = _experts(w_EFD.contiguous(), kind, True, backend)
            grad_x = _product(rows, scales, w_t, w_scales, ends_E, x_dtype, backend)
        if ctx.needs_input_grad[1]:
            grad_w = _product_weights(*by_expert, *x_by_expert, ends_E, len(grad_SF), w_EFD.dtype, backend)
        return grad_x, grad_w, None, None, None, None


def blocks_by_expert(S: int, E: int) -> int:
    """p, of which every division of S rows among E experts and nobody needs no more."""
    return (S + (BLOCK - 1) * (E + 1)) // BLOCK


def quantise_by_expert_reference(x_SD: Tensor, ends_E: Tensor, kind: Scales = "float") -> tuple[Quantised, Quantised]:
    """Rows (S, D) with scales (S, d), and by expert (D, P) with scales (D, p). Rows of nobody, whatever they hold, and
    what is behind the last expert are zeros with the smallest scale."""
    S, E = len(x_SD), len(ends_E)
    ends = ends_E.tolist()
    owned_SD = torch.arange(S, device=x_SD.device)[:, None] < ends[-1]
    x_SD = x_SD.masked_fill(~owned_SD, 0)
    padded = [F.pad(x_SD[rows], (0, 0, 0, -(rows.stop - rows.start) % BLOCK)) for rows in _rows_of(ends)]
    by_expert_PD = torch.cat(padded)
    by_expert_PD = F.pad(by_expert_PD, (0, 0, 0, blocks_by_expert(S, E) * BLOCK - len(by_expert_PD)))
    return quantise_rows_reference(x_SD, kind), quantise_rows_reference(by_expert_PD.t().contiguous(), kind)


def quantise_experts_reference(w_EFD: Tensor, kind: Scales = "float", transposed: bool = False) -> Quantised:
    """Blocks of every expert, (E, F, D) with scales (E, f, d); of the transposes if `transposed`."""
    each = [quantise_blocks_reference(w_FD.t() if transposed else w_FD, kind) for w_FD in w_EFD]
    with torch.autocast(w_EFD.device.type, enabled=False):  # it would look for a common dtype, and knows no E4M3
        return Quantised(torch.stack([q.values for q in each]), torch.stack([q.scales for q in each]))


def _rows_of(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@torch.library.custom_op("lit_kernels::quantise_by_expert", mutates_args=())
def _by_expert(x: Tensor, ends: Tensor, kind: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend != "triton":
        rows, by_expert = quantise_by_expert_reference(x, ends, kind)  # type: ignore[arg-type]
        return rows.values, rows.scales, by_expert.values, by_expert.scales
    from lit_kernels.gpu import grouped_quantise

    blocks = blocks_by_expert(x.shape[0], ends.shape[0])
    rows, by_expert = grouped_quantise.quantise_by_expert(x, ends, blocks, kind)  # type: ignore[arg-type]
    return rows.values, rows.scales, by_expert.values, by_expert.scales


@_by_expert.register_fake
def _(x: Tensor, ends: Tensor, kind: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (S, D), p = x.shape, blocks_by_expert(x.shape[0], ends.shape[0])
    scales = (x.new_empty(-(-D // BLOCK), S, dtype=torch.float32).t(), x.new_empty(p, D, dtype=torch.float32).t())
    return x.new_empty(S, D, dtype=E4M3), scales[0], x.new_empty(D, p * BLOCK, dtype=E4M3), scales[1]


@torch.library.custom_op("lit_kernels::quantise_experts", mutates_args=())
def _experts(w: Tensor, kind: str, transposed: bool, backend: str) -> tuple[Tensor, Tensor]:
    if backend != "triton":
        return tuple(quantise_experts_reference(w, kind, transposed))  # type: ignore[arg-type, return-value]
    from lit_kernels.gpu import grouped_quantise

    return tuple(grouped_quantise.quantise_experts(w, kind, transposed))  # type: ignore[arg-type, return-value]


@_experts.register_fake
def _(w: Tensor, kind: str, transposed: bool, backend: str) -> tuple[Tensor, Tensor]:
    E, N, K = (w.transpose(1, 2) if transposed else w).shape
    return w.new_empty(E, N, K, dtype=E4M3), w.new_empty(E, -(-N // BLOCK), -(-K // BLOCK), dtype=torch.float32)


@torch.library.custom_op("lit_kernels::fp8_grouped_gemm", mutates_args=())
def _product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    """a b_e^T of rows `a` and blocks `b`, (S, N)."""
    if backend == "triton":
        from lit_kernels.gpu import grouped

        return grouped.fp8_gemm(Quantised(a, a_scales), Quantised(b, b_scales), ends, dtype)
    out = a.new_zeros(len(a), b.shape[1], dtype=dtype)
    for rows, *expert in zip(_rows_of(ends.tolist()), b, b_scales, strict=True):
        if rows.stop > rows.start:
            out[rows] = gemm(Quantised(a[rows], a_scales[rows]), Quantised(*expert), dtype, backend)
    return out


@_product.register_fake
def _(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@torch.library.custom_op("lit_kernels::fp8_grouped_gemm_weights", mutates_args=())
def _product_weights(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, S: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """a_e b_e^T of `a` and `b` by expert, (E, F, D)."""
    if backend == "triton":
        from lit_kernels.gpu import grouped

        return grouped.fp8_gemm_weights(Quantised(a, a_scales), Quantised(b, b_scales), ends, S, dtype)
    out, first = a.new_zeros(len(ends), len(a), len(b), dtype=dtype), 0
    for e, rows in enumerate(_rows_of(ends.tolist())):
        last = first - (rows.start - rows.stop) // BLOCK
        columns, blocks, first = slice(first * BLOCK, last * BLOCK), slice(first, last), last
        if rows.stop > rows.start:
            expert_a, expert_b = (
                Quantised(values[:, columns].contiguous(), scales[:, blocks])
                for values, scales in ((a, a_scales), (b, b_scales))
            )
            out[e] = gemm(expert_a, expert_b, dtype, backend)
    return out


@_product_weights.register_fake
def _(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, S: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[0], dtype=dtype)
