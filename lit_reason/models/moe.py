"""Mixture of experts as in DeepSeek-V3 (2412.19437 eq. 12-20): sigmoid scores in float32, group-limited top-k on
biased scores, weights from the unbiased ones, auxiliary-loss-free balancing. `ModelConfig.scoring`, `group_score` and
`norm_topk_prob` make it DeepSeek-V2's (2405.04434 section 2.1.2), whose biases stay 0.

Replay (2510.11370): where an engine tells which experts it chose, these are taken, with weights from the router's own
scores of now, so that engine and trainer compute the same function and the router still learns.

Shapes: N tokens (flattened), E experts, K chosen, D width, F expert width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lit_kernels.sizes import round_up
from torch import Tensor, nn

from lit_reason.models.config import ModelConfig
from lit_reason.models.layers import SwiGLU, compute_dtype, silu_mul


@dataclass(slots=True)
class Routing:
    """What the router chose: `experts_NK` int64, `weights_NK` float32 (their sum is `routed_scale` when they are
    normalised), `scores_NE`. With replay also `replayed_N`, bool, and `own_NK`, what it would have chosen."""

    experts_NK: Tensor
    weights_NK: Tensor
    scores_NE: Tensor
    replayed_N: Tensor | None = None
    own_NK: Tensor | None = None


class Router(nn.Module):
    """Scores the experts. Its weight and buffers stay float32 whatever `.to(dtype)` asks: a bias in bfloat16 cannot
    take steps of 1e-3, and rounded scores choose other experts.

    Buffers:
        bias_E: added to the scores for selection only; moved by `update_bias`, never by a gradient.
        load_E: assignments counted in training since the last update (in the checkpoint).

    Attributes:
        replays_2: tokens replayed in training with other experts than the router's own, and all replayed ones, since
            `take_replays`; None if there were none.
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.k, self.scale = config.experts_per_token, config.routed_scale
        self.groups, self.kept_groups = config.expert_groups, config.groups_per_token
        self.group_best = {"top2": 2, "max": 1}[config.group_score]
        self.score = {"sigmoid": torch.sigmoid, "softmax": _softmax}[config.scoring]
        self.normalise = config.norm_topk_prob
        self.centre_bias = config.centre_bias
        self.weight = nn.Parameter(torch.empty(config.experts, config.width))
        self.register_buffer("bias_E", torch.zeros(config.experts))
        self.register_buffer("load_E", torch.zeros(config.experts))
        self.replays_2: Tensor | None = None

    def _apply(self, fn, recurse: bool = True):  # type: ignore[override]
        kept = {name: tensor.detach() for name, tensor in self._tensors()}
        super()._apply(fn, recurse)
        for name, tensor in self._tensors():
            if tensor.dtype != torch.float32:
                tensor.data = kept[name].to(tensor.device)
        return self

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [("weight", self.weight), ("bias_E", self.bias_E), ("load_E", self.load_E)]

    def forward(self, x_ND: Tensor, experts_NK: Tensor | None = None) -> Routing:
        """The chosen experts and their weights.

        Args:
            experts_NK: integers, the experts to take instead of the best ones; -1 for tokens whose are not known.

        Trap: the weights must be gathered from all scores. Those that are left after the router's own top-k are 0 for
        an expert that only the engine chose, and so is their gradient.
        """
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NE = self.score(x_ND.to(torch.promote_types(self.weight.dtype, torch.float32)) @ self.weight.t())
        own_NK = chosen_NK = self._select(scores_NE.detach() + self.bias_E)
        replayed_N = None
        if experts_NK is not None:
            replayed_N = (experts_NK >= 0).all(1)
            chosen_NK = torch.where(replayed_N[:, None], experts_NK.long(), own_NK)
        weights_NK = scores_NE.gather(1, chosen_NK)
        if self.normalise:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return Routing(chosen_NK, weights_NK * self.scale, scores_NE, replayed_N, own_NK)

    def _select(self, biased_NE: Tensor) -> Tensor:
        """Top-k of the experts in the best groups; a group scores the sum of its best: two in V3, one in V2."""
        if self.groups > 1:
            grouped_NGM = biased_NE.unflatten(1, (self.groups, -1))
            score_NG = grouped_NGM.topk(self.group_best, dim=-1).values.sum(-1)
            kept = score_NG.topk(self.kept_groups, dim=-1).indices
            dropped_NG = torch.ones_like(score_NG, dtype=torch.bool).scatter_(1, kept, False)
            biased_NE = grouped_NGM.masked_fill(dropped_NG[..., None], float("-inf")).flatten(1)
        return biased_NE.topk(self.k, dim=-1).indices

    @torch.no_grad()
    def count(self, experts_NK: Tensor, valid_N: Tensor | None) -> None:
        """Adds the assignments of valid tokens to `load_E`."""
        flat = experts_NK if valid_N is None else experts_NK[valid_N]
        self.load_E += torch.bincount(flat.flatten(), minlength=self.load_E.numel())

    def count_replays(self, routing: Routing) -> None:
        """Adds to `replays_2`; the order of a token's experts means nothing."""
        if routing.replayed_N is None or routing.own_NK is None:
            return
        differs_N = (routing.experts_NK.sort(1).values != routing.own_NK.sort(1).values).any(1)
        found_2 = torch.stack((differs_N.sum(), routing.replayed_N.sum()))
        self.replays_2 = found_2 if self.replays_2 is None else self.replays_2 + found_2

    def take_replays(self) -> Tensor | None:
        """`replays_2`, which starts anew."""
        found, self.replays_2 = self.replays_2, None
        return found

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """b_i += rate * sign(mean load - load_i), then the counters start anew (2408.15664).

        With `centre_bias` the biases' mean is taken off: the choice stays the same, and the biases cannot drift
        together to where float32 steps are coarse.
        """
        if rate:
            self.bias_E += rate * torch.sign(self.load_E.mean() - self.load_E)
            if self.centre_bias:
                self.bias_E -= self.bias_E.mean()
        self.load_E.zero_()


def _softmax(logits_NE: Tensor) -> Tensor:
    return logits_NE.softmax(-1)


class Experts(nn.Module):
    """E SwiGLU experts with stacked weights: `gate_up` (E, 2F, D), gate rows first, and `down` (E, D, F)."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """sum_k weight_k * expert_k(x), (N, D): tokens are dealt to E blocks of C slots, one batched product each."""
        E = self.down.shape[0]
        dtype = compute_dtype(x_ND)
        slot_NK, token_EC = deal(routing.experts_NK, E)
        x_ECD = x_ND.to(dtype).index_select(0, token_EC).unflatten(0, (E, -1))
        hidden_ECF = silu_mul(torch.bmm(x_ECD, self.gate_up.to(dtype).transpose(1, 2)))
        out_ECD = torch.bmm(hidden_ECF, self.down.to(dtype).transpose(1, 2))
        weights_NK = routing.weights_NK.to(dtype)
        return F.embedding_bag(slot_NK, out_ECD.flatten(0, 1), per_sample_weights=weights_NK, mode="sum")


def deal(experts_NK: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Gives every (token, choice) a slot of its expert's block; no token is ever dropped.

    Returns:
        slot_NK: index into the E * C slots.
        token_EC: (E * C,), which token a slot reads; an empty slot reads token 0 and is read by nobody.
    """
    N, K = experts_NK.shape
    flat = experts_NK.flatten()
    order = flat.argsort(stable=True)
    counts_E = torch.bincount(flat, minlength=E)
    capacity = round_up(int(counts_E.max()))
    shift_E = torch.arange(E, device=flat.device) * capacity - (counts_E.cumsum(0) - counts_E)
    slot = torch.arange(N * K, device=flat.device) + shift_E[flat[order]]
    token_EC = torch.zeros(E * capacity, dtype=torch.int64, device=flat.device).scatter_(0, slot, order // K)
    slot_NK = torch.empty_like(flat).scatter_(0, order, slot)
    return slot_NK.view(N, K), token_EC


class MoE(nn.Module):
    """Routed experts plus shared experts, which are neither scaled nor gated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config.experts, config.width, config.expert_width)
        hidden = config.shared_experts * config.expert_width
        self.shared = SwiGLU(config.width, hidden) if hidden else None

    def forward(
        self, x: Tensor, valid: Tensor | None = None, experts_NK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the layer's output and, in training, its balance loss (before the coefficient).

        Args:
            x: (B, T, D) in training and prefill, (B, D) in decoding.
            valid: bool (B, T), False for padding, which is left out of load and balance loss.
            experts_NK: to be replayed, as in `Router.forward`.
        """
        x_ND = x.flatten(0, -2)
        routing = self.router(x_ND, experts_NK)
        out = self.experts(x_ND, routing)
        if self.shared is not None:
            out = out + self.shared(x_ND)
        balance = None
        if self.training and torch.is_grad_enabled():
            self.router.count(routing.experts_NK, None if valid is None else valid.flatten())
            self.router.count_replays(routing)
            if x.dim() == 3:
                balance = sequence_balance(routing.scores_NE.view(*x.shape[:2], -1), self.router.k, valid)
        return out.view(x.shape), balance


def sequence_balance(scores_BTE: Tensor, k: int, valid_BT: Tensor | None = None) -> Tensor:
    """sum_i f_i P_i averaged over sequences; 1 when perfectly balanced (2412.19437 eq. 17-20, alpha left out).

    f_i = E/(K T) * #{t: i in top-k of the *unbiased* scores}, P_i = mean_t s_it / sum_j s_jt.
    """
    E = scores_BTE.shape[-1]
    valid = torch.ones_like(scores_BTE[..., :1]) if valid_BT is None else valid_BT[..., None].to(scores_BTE.dtype)
    tokens_B1 = valid.sum(1).clamp_min(1)
    chosen = torch.zeros_like(scores_BTE).scatter_(-1, scores_BTE.detach().topk(k, dim=-1).indices, 1.0)
    f_BE = (chosen * valid).sum(1) * (E / k) / tokens_B1
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    p_BE = (share_BTE * valid).sum(1) / tokens_B1
    return (f_BE * p_BE).sum(-1).mean()
