"""The decoder: embedding, blocks, head; and the prefill/decode protocol that engines drive."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError, RolloutError
from lit_reason.models.attention import causal
from lit_reason.models.block import Block
from lit_reason.models.cache import Cursor, LatentCache
from lit_reason.models.config import ModelConfig
from lit_reason.models.layers import RMSNorm, compute_dtype
from lit_reason.models.mla import AttendLatents
from lit_reason.models.moe import MoE, Router
from lit_reason.models.mtp import MTPModule
from lit_reason.models.packing import Packed, pack
from lit_reason.models.rope import rope_table


class Hidden(NamedTuple):
    """Final normalised states (B, T, D) and the summed balance loss (a 0-d tensor, 0 outside training)."""

    states_BTD: Tensor
    balance: Tensor


class Place(Protocol):
    """Where the newest tokens of the rows stand: their positions, and attention to what came before."""

    position_BK: Tensor

    def attend(self, layer: int, q_THC: Tensor, new_BKC: Tensor) -> Tensor:
        """`mla.AttendLatents` of that layer."""
        ...


class Decoder(Protocol):
    """One layer's attention as it decodes: `MLA`, or another layout of its weights."""

    def decode(self, x_BKD: Tensor, rotation_BKR: Tensor, attend: AttendLatents) -> Tensor: ...


class Transformer(nn.Module):
    """A causal language model of `config`'s shape, initialised by muP's table.

    Example::

        model = Transformer(ModelConfig(width=64))
        logits_BTV = model(torch.tensor([[1, 2, 3]]))

    Raises:
        ConfigError: when a sequence is longer than `config.max_seq_len`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            Block(config, dense=i < config.first_dense, scale=config.residual_scale) for i in range(config.depth)
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTPModule(config) for _ in range(config.mtp_depth))
        if self.embed.weight.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter from its role's initial distribution (`mup.parameter_roles`)."""
        from lit_reason.models.mup import parameter_roles

        roles = parameter_roles(self)
        for name, parameter in self.named_parameters():
            roles[name].init(parameter)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BTV."""
        return self.head(self.hidden(input_ids_BT).states_BTD)

    def hidden(self, input_ids_BT: Tensor, valid_BT: Tensor | None = None, cache: LatentCache | None = None) -> Hidden:
        """Everything but the head.

        Args:
            input_ids_BT: int64; padding on the right is harmless because attention is causal.
            valid_BT: bool, False for padding: kept out of expert load and balance loss.
            cache: filled with the latents of these positions.
        """
        T = input_ids_BT.shape[1]
        self._check_length(T)
        rotation = rope_table(self.config, input_ids_BT.device)[:T]
        x = self.embed(input_ids_BT)
        balance = x.new_zeros((), dtype=torch.float32)
        for i, block in enumerate(self.blocks):
            x, loss = block(x, rotation, causal, None if cache is None else cache.layers[i], valid_BT)
            balance = balance if loss is None else balance + loss
        return Hidden(self.norm(x), balance)

    def further(self, hidden: Hidden, target_ids_BT: Tensor, valid_BT: Tensor | None = None) -> list[Hidden]:
        """What the multi-token-prediction modules make of the trunk's `hidden`, for training.

        State i of the k-th entry (k = 1, 2, ...) predicts `target_ids_BT[:, i + k]`; its last k say nothing.

        Args:
            target_ids_BT: the token after each input.
            valid_BT: as in `hidden`; depth k counts position i if input i + k is there.
        """
        valid_BT = torch.ones_like(target_ids_BT, dtype=torch.bool) if valid_BT is None else valid_BT
        rotation = rope_table(self.config, target_ids_BT.device)[: target_ids_BT.shape[1]]
        found = []
        for k, module in enumerate(self.mtp, start=1):
            embedded = self.embed(target_ids_BT.roll(1 - k, dims=1))
            counted_BT = torch.zeros_like(valid_BT)
            counted_BT[:, :-k] = valid_BT[:, k:]
            states, balance = module(hidden.states_BTD, embedded, rotation, causal, valid=counted_BT)
            hidden = Hidden(states, states.new_zeros(()) if balance is None else balance)
            found.append(hidden)
        return found

    def states_at(self, input_ids_BT: Tensor, counts_BT: Tensor, experts_BTLK: Tensor | None = None) -> Tensor:
        """What the head reads to predict the targets that count, in row-major order: states_MD.

        Args:
            input_ids_BT: int64, right-padded; rows that agree up to their first counted target compute it once.
            counts_BT: bool, targets (the token after each input) that count.
            experts_BTLK: integers, the experts to replay in each of the trunk's L MoE layers; -1 where the routers
                choose.

        Raises:
            RolloutError: the experts are not of this architecture.
        """
        if experts_BTLK is not None:
            self._check_experts(experts_BTLK, input_ids_BT.shape)
        batch = pack(input_ids_BT, counts_BT, experts_BTLK)
        return self.packed(batch).index_select(0, batch.state_M)

    def packed(self, batch: Packed) -> Tensor:
        """Everything but the head on packed tokens: states_ND. There is no balance loss, which is per sequence; the
        router counts a shared prompt once, as it is computed."""
        self._check_length(int(batch.position_N.max()) + 1)
        rotation = rope_table(self.config, batch.ids_N.device)[batch.position_N]
        x = self.embed(batch.ids_N)
        attend = batch.attention(compute_dtype(x))
        replay = iter(() if batch.experts_NLK is None else batch.experts_NLK.unbind(1))
        for block in self.blocks:
            x, _ = block(x, rotation, attend, experts_NK=next(replay, None) if isinstance(block.ffn, MoE) else None)
        return self.norm(x)

    def _check_length(self, T: int) -> None:
        if self.config.max_seq_len < T:
            raise ConfigError(
                f"a sequence of {T} tokens; the model takes {self.config.max_seq_len} (model.max_seq_len)"
            )

    def _check_experts(self, experts_BTLK: Tensor, tokens: torch.Size) -> None:
        shape = (*tokens, self.config.moe_layers, self.config.experts_per_token)
        if experts_BTLK.shape != shape:
            raise RolloutError(
                f"the experts to replay have shape {tuple(experts_BTLK.shape)}; this model takes {shape}: rows, "
                "tokens, MoE layers of the trunk, experts per token. PolicyModule(..., replay_routing=False) goes on "
                "without them"
            )
        if experts_BTLK.numel() and (largest := int(experts_BTLK.max())) >= self.config.experts:
            raise RolloutError(f"expert {largest} is to be replayed; this model has 0..{self.config.experts - 1}")

    def prefill_draft(self, hidden: Hidden, next_BT: Tensor, cache: LatentCache) -> Tensor:
        """Reads prompts into the cache of the first multi-token-prediction module; its states_BTD. See `draft`."""
        rotation = rope_table(self.config, next_BT.device)[: next_BT.shape[1]]
        layer = cache.layers[len(self.blocks)]
        return self.mtp[0](hidden.states_BTD, self.embed(next_BT), rotation, causal, layer)[0]

    def prefill(self, input_ids_BT: Tensor, length_B: Tensor, cache: LatentCache) -> Tensor:
        """Reads right-padded prompts of `length_B` tokens into the cache; logits_BV of each row's last token."""
        states_BTD = self.hidden(input_ids_BT, cache=cache).states_BTD
        return self.head(states_BTD[torch.arange(len(length_B), device=length_B.device), length_B - 1])

    def decode(self, token_B: Tensor, position_B: Tensor, cache: LatentCache) -> Tensor:
        """One token per row at `position_B`; logits_BV of the next."""
        at = self.cursor(position_B[:, None], cache)
        return self.head(self.decode_states(token_B[:, None], at)[:, 0])

    def cursor(self, position_BK: Tensor, cache: LatentCache) -> Cursor:
        """Where `decode_states` and `draft` shall read and write; the cache grows to hold these positions."""
        return Cursor(position_BK, cache, self.config.heads)

    def decode_states(self, token_BK: Tensor, at: Place, layers: Sequence[Decoder] | None = None) -> Tensor:
        """K tokens per row at `at`'s positions; the states_BKD that the head reads.

        Args:
            layers: what decodes in the place of the blocks' attention (`absorbed.Absorbed`).
        """
        x = self.embed(token_BK)
        rotation_BKR = rope_table(self.config, token_BK.device)[at.position_BK]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            decoder = block.attn if layers is None else layers[i]
            x = block.decode(x, partial(decoder.decode, rotation_BKR=rotation_BKR, attend=partial(at.attend, i)))
        return self.norm(x)

    def draft(self, states_BKD: Tensor, next_BK: Tensor, at: Place) -> Tensor:
        """The first multi-token-prediction module's logits_BKV of the token after `next_BK`.

        Args:
            states_BKD: the trunk's, of `decode_states` at the same place.
            next_BK: the token after each position.
            at: its cache's layer after the trunk's belongs to the module and holds all positions before these.
        """
        rotation_BKR = rope_table(self.config, next_BK.device)[at.position_BK]
        module, attend = self.mtp[0], partial(at.attend, len(self.blocks))
        assert isinstance(module, MTPModule)
        return self.head(module.decode(states_BKD, self.embed(next_BK), rotation_BKR, attend))

    def new_cache(self, rows: int, capacity: int, draft: bool = False) -> LatentCache:
        """An empty cache in the weights' dtype and on their device; `draft`: with a layer for `draft` too."""
        weight = self.embed.weight
        return LatentCache(self.config, rows, capacity, draft=draft, dtype=weight.dtype, device=weight.device)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]
