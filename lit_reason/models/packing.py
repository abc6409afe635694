"""Packed batches: every token that counts once, prompts that rows share once, no padding.

    row 0   p p p a a a .            N tokens:  p p p | q q | a a a | b b | c c c c
    row 1   p p p b b . .     ->                 shared prefixes   each row's own tokens
    row 2   q q c c c c .

The G completions of a prompt compute it once instead of G times, and everything but attention runs on (N, D).
Attention unpacks: a prefix sees itself, a row's own tokens see its prefix and themselves.

Shapes: B rows, T positions of the batch, P distinct prefixes, L the longest prefix, A the longest rest after it; of
experts_NLK and experts_BTLK: L MoE layers, K experts per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_reason.models.attention import Attend, attend


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch's tokens as one row of N, and how attention finds them again.

    Args:
        ids_N, position_N: int64.
        state_M: for every target that counts, in the batch's row-major order, the token that predicts it (0..N-1).
        prefix_PL, own_BA: where the tokens lie in the row of N; 0 for padding.
        prefix_tokens, own_tokens: the flat indices of what is not padding, in the order of the row of N.
        keys_BS: the keys of `own_BA`: its prefix (S = L + A), then itself.
        hidden_BAS: bool, keys that a query may not see.
        experts_NLK: the experts to replay, -1 where they are not known; None if nowhere.
    """

    ids_N: Tensor
    position_N: Tensor
    state_M: Tensor
    prefix_PL: Tensor
    own_BA: Tensor
    prefix_tokens: Tensor
    own_tokens: Tensor
    keys_BS: Tensor
    hidden_BAS: Tensor
    experts_NLK: Tensor | None = None

    def attention(self, dtype: torch.dtype) -> Attend:
        """Attention of packed tokens with scores in `dtype`; every layer shares its mask."""
        bias = torch.zeros(self.hidden_BAS.shape, dtype=dtype, device=self.ids_N.device)
        bias = bias.masked_fill_(self.hidden_BAS, float("-inf"))[:, None]

        def attend_packed(q_NHd: Tensor, k_NHd: Tensor, v_NHd: Tensor, scale: float) -> Tensor:
            q, k, v = (_take(x, self.prefix_PL) for x in (q_NHd, k_NHd, v_NHd))
            prefix = attend(q, k, v, scale).flatten(0, 1).index_select(0, self.prefix_tokens)
            if not self.own_tokens.numel():
                return prefix
            q, k, v = _take(q_NHd, self.own_BA), _take(k_NHd, self.keys_BS), _take(v_NHd, self.keys_BS)
            own = attend(q, k, v, scale, bias).flatten(0, 1).index_select(0, self.own_tokens)
            return torch.cat((prefix, own))

        return attend_packed


def pack(input_ids_BT: Tensor, counts_BT: Tensor, experts_BTLK: Tensor | None = None) -> Packed:
    """Packs a right-padded batch. Rows that agree up to their first counted target share that prefix.

    Args:
        counts_BT: bool, targets (the token after each input) that count; rows without any are left out.
        experts_BTLK: integers, the experts of each input token, -1 where they are not known. A shared token gets those
            of the first of its rows that knows them.
    """
    kept = counts_BT.any(1)
    kept[0] |= ~kept.any()  # nothing counts: one token all the same, so that there is a graph with gradients of 0
    ids_BT, counts_BT = input_ids_BT[kept], counts_BT[kept]
    B, T = ids_BT.shape
    position_T = torch.arange(T, device=ids_BT.device)
    prefix_B = counts_BT.int().argmax(1) + 1  # the inputs that predict the first target or stand before it
    end_B = torch.where(counts_BT.any(1), T - counts_BT.flip(1).int().argmax(1), prefix_B)

    in_prefix_BT = position_T < prefix_B[:, None]
    prefixes_PL, prefix_of_B = ids_BT.masked_fill(~in_prefix_BT, -1).unique(dim=0, return_inverse=True)
    prefixes_PL = prefixes_PL[:, : int(prefix_B.max())]
    real_PL = prefixes_PL >= 0
    prefix_tokens = real_PL.flatten().nonzero().squeeze(1)

    position_BA = prefix_B[:, None] + position_T[: int((end_B - prefix_B).max())]
    real_BA = position_BA < end_B[:, None]
    own_tokens = real_BA.flatten().nonzero().squeeze(1)

    prefix_PL = _places(real_PL)
    own_BA = _places(real_BA) + prefix_tokens.numel() * real_BA
    # The state before a row's first target is the prefix's last; the others are its own.
    last_B = prefix_PL.gather(1, real_PL.sum(1, keepdim=True) - 1).squeeze(1)[prefix_of_B]
    row_M, target_M = counts_BT.nonzero(as_tuple=True)
    state_M = torch.cat((last_B[:, None], own_BA), dim=1)[row_M, target_M - prefix_B[row_M] + 1]

    A, L = own_BA.shape[1], prefix_PL.shape[1]
    hidden_BL = position_T[:L] >= prefix_B[:, None]
    future_AA = torch.ones(A, A, dtype=torch.bool, device=ids_BT.device).triu(1)
    experts_NLK = None
    if experts_BTLK is not None:
        experts_BTLK = experts_BTLK[kept]
        own = experts_BTLK[real_BA.nonzero()[:, 0], position_BA[real_BA]]
        experts_NLK = torch.cat((_shared_experts(experts_BTLK, prefix_of_B, real_PL), own))
    return Packed(
        ids_N=torch.cat((prefixes_PL[real_PL], ids_BT.gather(1, position_BA.clamp_max(T - 1))[real_BA])),
        position_N=torch.cat((position_T[:L].expand_as(real_PL)[real_PL], position_BA[real_BA])),
        state_M=state_M,
        prefix_PL=prefix_PL,
        own_BA=own_BA,
        prefix_tokens=prefix_tokens,
        own_tokens=own_tokens,
        keys_BS=torch.cat((prefix_PL[prefix_of_B], own_BA), dim=1),
        hidden_BAS=torch.cat((hidden_BL[:, None].expand(B, A, L), future_AA.expand(B, A, A)), dim=2),
        experts_NLK=experts_NLK,
    )


def _shared_experts(experts_BTLK: Tensor, prefix_of_B: Tensor, real_PL: Tensor) -> Tensor:
    """Of every token of the P prefixes, in row-major order, the experts of the first of its rows that knows any."""
    B, (P, L) = len(experts_BTLK), real_PL.shape
    known_BL = (experts_BTLK[:, :L] >= 0).flatten(2).any(2)
    row_B1 = torch.arange(B, device=real_PL.device)[:, None]
    none_PL = torch.full((P, L), B, device=real_PL.device)
    first_PL = none_PL.scatter_reduce(
        0, prefix_of_B[:, None].expand(B, L), torch.where(known_BL, row_B1, B), reduce="amin"
    )
    prefix, position = real_PL.nonzero(as_tuple=True)
    first_N = first_PL[prefix, position]
    found_NLK = experts_BTLK[first_N.clamp_max(B - 1), position]
    return found_NLK.masked_fill((first_N == B)[:, None, None], -1)


def _places(real: Tensor) -> Tensor:
    """0, 1, 2, ... over the true entries in row-major order; 0 elsewhere."""
    return (real.flatten().cumsum(0).view(real.shape) - 1) * real


def _take(x_NHd: Tensor, index: Tensor) -> Tensor:
    """(*index.shape, H, d)."""
    return x_NHd.flatten(1).index_select(0, index.flatten()).view(*index.shape, *x_NHd.shape[1:])
