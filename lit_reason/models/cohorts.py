"""The latents of a batch that rows enter and leave while it runs.

    cohort    rows that entered together
              prompt latents (P, L, C): each distinct prompt once, read once for all its rows
              own latents (B, S, C): the rows' tokens; the newest goes into the same slot of every row

Rows of a cohort are equally old, so none carries another's padding, and only prompts are masked. Attention goes cohort
by cohort; everything else in the model is done on all rows at once. Small neighbours become one cohort, the younger
rows shifted to the older ones' slots.

Shapes: B rows, H heads, S own slots, L prompt positions, P prompts, C = kv_lora_rank + qk_rope_head_dim."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lit_kernels.sizes import round_up
from torch import Tensor

from lit_reason.models.cache import SLOTS

SMALL = 32  # rows under which a cohort's own products cost more than shifting it to its neighbour's slots


class Cohort:
    """Rows that entered together.

    Args:
        layers: (P, L, C) of each layer, the prompts' latents, right-padded.
        length_P: the prompts' lengths (tokens).
        prompt_B: int64, the prompt of each row.
    """

    def __init__(self, layers: list[Tensor], length_P: Tensor, prompt_B: Tensor) -> None:
        self.prompts, self.age = layers, 0
        position_L = torch.arange(layers[0].shape[1], device=prompt_B.device)
        self.bias_P1L = layers[0].new_zeros(len(length_P), 1, len(position_L))
        self.bias_P1L.masked_fill_((position_L >= length_P[:, None])[:, None], float("-inf"))
        self.own = [layer.new_zeros(len(prompt_B), SLOTS, layer.shape[2]) for layer in layers]
        self.start_B: Tensor | None = None  # the first own slot of each row; None: 0 for all
        self._seat(prompt_B)

    def __len__(self) -> int:
        return len(self.prompt_B)

    def _seat(self, prompt_B: Tensor) -> None:
        """Gives every row one of G seats at its prompt, so that a prompt is read by one product for all its rows."""
        B, P, device = len(prompt_B), len(self.bias_P1L), prompt_B.device
        order = prompt_B.argsort(stable=True)
        rows_P = torch.bincount(prompt_B, minlength=P)
        G = int(rows_P.max())
        rank = torch.arange(B, device=device) - (rows_P.cumsum(0) - rows_P)[prompt_B[order]]
        self.prompt_B = prompt_B
        self.seat_B = torch.empty_like(prompt_B).scatter_(0, order, prompt_B[order] * G + rank)
        # An empty seat reads row 0 and is read by nobody.
        self.row_seats = torch.zeros(P * G, dtype=torch.int64, device=device).scatter_(
            0, self.seat_B, torch.arange(B, device=device)
        )
        self.in_order = P * G == B and bool((self.row_seats[1:] > self.row_seats[:-1]).all())

    def make_room(self) -> None:
        """The next token's slot exists. S stays as small as it may be: products read whole tensors."""
        if self.age == self.own[0].shape[1]:
            self.own = [torch.cat((x, x.new_zeros(len(x), SLOTS, x.shape[2])), dim=1) for x in self.own]

    def attend(self, layer: int, q_BHC: Tensor, new_BC: Tensor) -> Tensor:
        """Puts the newest latents into slot `age`; softmax over prompt and own tokens; out_BHC."""
        prompt_PLC, own_BSC = self.prompts[layer], self.own[layer]
        H, (P, L, C), S = q_BHC.shape[1], prompt_PLC.shape, own_BSC.shape[1]
        own_BSC[:, self.age] = new_BC
        q_PQC = self._to_seats(q_BHC).view(P, -1, C)  # Q = G H
        prompt_BHL = self._from_seats(torch.baddbmm(self.bias_P1L, q_PQC, prompt_PLC.transpose(1, 2)).view(-1, H, L))
        own_BHS = torch.bmm(q_BHC, own_BSC.transpose(1, 2))
        own_BHS[..., self.age + 1 :] = float("-inf")
        if self.start_B is not None:
            slot_S = torch.arange(S, device=q_BHC.device)
            own_BHS.masked_fill_((slot_S < self.start_B[:, None])[:, None], float("-inf"))
        weights_BHL, weights_BHS = torch.cat((prompt_BHL, own_BHS), dim=-1).softmax(-1).split((L, S), dim=-1)
        out_PQC = torch.bmm(self._to_seats(weights_BHL).reshape(P, -1, L), prompt_PLC)
        return torch.bmm(weights_BHS, own_BSC).add_(self._from_seats(out_PQC.view(-1, H, C)))

    def _to_seats(self, x_B: Tensor) -> Tensor:
        return x_B if self.in_order else x_B.index_select(0, self.row_seats)

    def _from_seats(self, x: Tensor) -> Tensor:
        return x if self.in_order else x.index_select(0, self.seat_B)

    def keep(self, index: Tensor) -> None:
        """Drops the other rows, and prompts that no row needs any more."""
        kept_P, prompt_B = self.prompt_B[index].unique(return_inverse=True)
        if len(kept_P) < len(self.bias_P1L):
            self.prompts = [x.index_select(0, kept_P) for x in self.prompts]
            self.bias_P1L = self.bias_P1L[kept_P]
        self.own = [x.index_select(0, index) for x in self.own]
        self.start_B = None if self.start_B is None else self.start_B[index]
        self._seat(prompt_B)

    def join(self, younger: Cohort) -> None:
        """Takes the rows of a younger cohort in, behind its own."""
        shift, (_, S, _), L = self.age - younger.age, self.own[0].shape, self.bias_P1L.shape[2]
        more = younger.bias_P1L.shape[2] - L
        a, b = max(more, 0), max(-more, 0)
        self.prompts = [
            torch.cat((F.pad(x, (0, 0, 0, a)), F.pad(y, (0, 0, 0, b))))
            for x, y in zip(self.prompts, younger.prompts, strict=True)
        ]
        hidden = float("-inf")
        bias = F.pad(self.bias_P1L, (0, a), value=hidden), F.pad(younger.bias_P1L, (0, b), value=hidden)
        prompts = len(self.bias_P1L)
        self.bias_P1L = torch.cat(bias)
        self.own = [
            torch.cat((x, F.pad(y[:, : younger.age], (0, 0, shift, S - self.age))))
            for x, y in zip(self.own, younger.own, strict=True)
        ]
        self.start_B = torch.cat((self._starts(), younger._starts() + shift))
        self._seat(torch.cat((self.prompt_B, younger.prompt_B + prompts)))

    def _starts(self) -> Tensor:
        return torch.zeros_like(self.prompt_B) if self.start_B is None else self.start_B


class Cohorts:
    """Cohorts from the oldest to the youngest; their rows in this order are the batch. A `transformer.Place`."""

    position_BK: Tensor

    def __init__(self) -> None:
        self.cohorts: list[Cohort] = []

    def admit(self, cohort: Cohort) -> None:
        """Its rows become the batch's last."""
        self.cohorts.append(cohort)

    def begin(self, position_B: Tensor) -> None:
        """The next decode step brings one token per row, at these positions."""
        self.position_BK = position_B[:, None]
        for cohort in self.cohorts:
            cohort.make_room()

    def end(self) -> None:
        for cohort in self.cohorts:
            cohort.age += 1

    def attend(self, layer: int, q_THC: Tensor, new_BKC: Tensor) -> Tensor:
        new_BC = new_BKC[:, 0]
        if len(self.cohorts) == 1:
            return self.cohorts[0].attend(layer, q_THC, new_BC)
        sizes = [len(cohort) for cohort in self.cohorts]
        parts = zip(self.cohorts, q_THC.split(sizes), new_BC.split(sizes), strict=True)
        return torch.cat([cohort.attend(layer, q, new) for cohort, q, new in parts])

    def drop(self, alive_B: Tensor) -> Tensor | None:
        """Drops rows that are not alive: all of a cohort without any, else down to one of few sizes (`round_up`).

        Returns:
            The rows that stay, as indices into the batch; None if all do.
        """
        kept, cohorts, first = [], [], 0
        for cohort, alive in zip(self.cohorts, alive_B.split([len(c) for c in self.cohorts]), strict=True):
            B, live = len(cohort), int(alive.sum())
            index = (~alive).argsort(stable=True)[: round_up(live) if live else 0]
            if 0 < len(index) < B:
                cohort.keep(index)
            if live:
                cohorts.append(cohort)
            kept.append(index + first if len(index) < B else torch.arange(first, first + B, device=index.device))
            first += B
        self.cohorts = cohorts
        self._join_small()
        return torch.cat(kept) if sum(map(len, kept)) < first else None

    def _join_small(self) -> None:
        joined: list[Cohort] = []
        for cohort in self.cohorts:
            if joined and min(len(joined[-1]), len(cohort)) < SMALL:
                joined[-1].join(cohort)
            else:
                joined.append(cohort)
        self.cohorts = joined
