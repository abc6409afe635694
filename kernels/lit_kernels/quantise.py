"""Quantising to E4M3 with one scale per block (`fp8.py` says what and gives the reference), in plain torch or in one
kernel each. None has a gradient: what quantises inside a model gives its own, as `linear.py` does.

Both give the same bits. Names and shapes for `dispatch`: the function's, (M, K).

Shapes: M rows, K columns, N rows of a weight; k, m, n: blocks of 128 of them."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_kernels.dispatch import choose
from lit_kernels.fp8 import (
    BLOCK,
    E4M3,
    Quantised,
    Scales,
    quantise_blocks_reference,
    quantise_both_reference,
    quantise_rows_reference,
)


def quantise_rows(x_MK: Tensor, kind: Scales = "float", backend: str = "auto") -> Quantised:
    """One scale per 128 neighbours of a row: values (M, K), scales (M, k).

    Args:
        kind: of the scales, "float" or "power of two".

    Raises:
        ValueError: x has not two dimensions, or (Triton) its last one is not contiguous.
    """
    if choose("quantise_rows", backend, x_MK.device, _shape(x_MK), fp8=True).backend == "torch":
        return quantise_rows_reference(x_MK, kind)
    return Quantised(*_quantise_rows(x_MK, kind))


def quantise_blocks(
    w_NK: Tensor, kind: Scales = "float", backend: str = "auto", *, transposed: bool = False
) -> Quantised:
    """One scale per 128 x 128: values (N, K), scales (n, k); of w^T if `transposed`. Errors: as of `quantise_rows`.

    The blocks of w^T are those of w, so that the gradient of an input is multiplied by the very numbers that the input
    was.
    """
    if choose("quantise_blocks", backend, w_NK.device, _shape(w_NK), fp8=True).backend == "torch":
        return quantise_blocks_reference(w_NK.t() if transposed else w_NK, kind)
    return Quantised(*_quantise_blocks(w_NK, kind, transposed))


def quantise_both(x_MK: Tensor, kind: Scales = "float", backend: str = "auto") -> tuple[Quantised, Quantised]:
    """Rows of x, and rows of x^T (values (K, M), scales (K, m)), from one read. Errors: as of `quantise_rows`."""
    if choose("quantise_both", backend, x_MK.device, _shape(x_MK), fp8=True).backend == "torch":
        return quantise_both_reference(x_MK, kind)
    values, scales, values_t, scales_t = _quantise_both(x_MK, kind)
    return Quantised(values, scales), Quantised(values_t, scales_t)


def _shape(x: Tensor) -> tuple[int, int]:
    if x.dim() != 2:
        raise ValueError(f"got shape {tuple(x.shape)}; valid: two dimensions. Type x.reshape(-1, x.shape[-1])")
    return x.shape[0], x.shape[1]


@torch.library.custom_op("lit_kernels::quantise_rows", mutates_args=())
def _quantise_rows(x_MK: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    from lit_kernels.gpu import quantise

    q = quantise.quantise_rows(x_MK, kind)  # type: ignore[arg-type]
    return q.values, q.scales


@_quantise_rows.register_fake
def _(x_MK: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    M, K = x_MK.shape
    return x_MK.new_empty(M, K, dtype=E4M3), _scales_of_rows(x_MK, M, K)


@torch.library.custom_op("lit_kernels::quantise_blocks", mutates_args=())
def _quantise_blocks(w_NK: Tensor, kind: str, transposed: bool) -> tuple[Tensor, Tensor]:
    from lit_kernels.gpu import quantise

    q = quantise.quantise_blocks(w_NK, kind, transposed)  # type: ignore[arg-type]
    return q.values, q.scales


@_quantise_blocks.register_fake
def _(w_NK: Tensor, kind: str, transposed: bool) -> tuple[Tensor, Tensor]:
    N, K = reversed(w_NK.shape) if transposed else w_NK.shape
    return w_NK.new_empty(N, K, dtype=E4M3), w_NK.new_empty(blocks(N), blocks(K), dtype=torch.float32)


@torch.library.custom_op("lit_kernels::quantise_both", mutates_args=())
def _quantise_both(x_MK: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lit_kernels.gpu import quantise

    rows, of_transpose = quantise.quantise_both(x_MK, kind)  # type: ignore[arg-type]
    return rows.values, rows.scales, of_transpose.values, of_transpose.scales


@_quantise_both.register_fake
def _(x_MK: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, K = x_MK.shape
    values, values_t = x_MK.new_empty(M, K, dtype=E4M3), x_MK.new_empty(K, M, dtype=E4M3)
    return values, _scales_of_rows(x_MK, M, K), values_t, _scales_of_rows(x_MK, K, M)


def _scales_of_rows(like: Tensor, M: int, K: int) -> Tensor:
    return like.new_empty(blocks(K), M, dtype=torch.float32).t()


def blocks(size: int) -> int:
    """Of 128, the last one perhaps shorter."""
    return -(-size // BLOCK)
