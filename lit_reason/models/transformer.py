"""The decoder: embedding, blocks, head; and the prefill/decode protocol that engines drive."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError
from lit_reason.models.attention import Attend, causal
from lit_reason.models.cache import LatentCache
from lit_reason.models.config import ModelConfig
from lit_reason.models.layers import RMSNorm, SwiGLU, compute_dtype
from lit_reason.models.mla import MLA, Cursor
from lit_reason.models.moe import MoE, Router
from lit_reason.models.packing import Packed
from lit_reason.models.rope import rope_table


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each branch scaled by 1/m_L (CompleteP, 2505.01618)."""

    def __init__(self, config: ModelConfig, dense: bool) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = MLA(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = SwiGLU(config.width, config.ffn_width) if dense else MoE(config)
        self.scale = config.residual_scale

    def forward(
        self, x: Tensor, rotation: Tensor, attend: Attend, cache: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x = torch.add(x, self.attn(self.attn_norm(x), rotation, attend, cache), alpha=self.scale)
        return self._feed_forward(x, valid)

    def decode(self, x: Tensor, rotation: Tensor, cache: Tensor, at: Cursor) -> Tensor:
        x = torch.add(x, self.attn.decode(self.attn_norm(x), rotation, cache, at), alpha=self.scale)
        return self._feed_forward(x, None)[0]

    def _feed_forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out, balance = (
            self.ffn(self.ffn_norm(x), valid) if isinstance(self.ffn, MoE) else (self.ffn(self.ffn_norm(x)), None)
        )
        return torch.add(x, out, alpha=self.scale), balance


class Hidden(NamedTuple):
    """Final normalised states (B, T, D) and the summed balance loss (a 0-d tensor, 0 outside training)."""

    states_BTD: Tensor
    balance: Tensor


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
        self.blocks = nn.ModuleList(Block(config, dense=i < config.first_dense) for i in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
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

    def packed(self, batch: Packed) -> Tensor:
        """Everything but the head on packed tokens: states_ND. There is no balance loss, which is per sequence; the
        router counts a shared prompt once, as it is computed."""
        self._check_length(int(batch.position_N.max()) + 1)
        rotation = rope_table(self.config, batch.ids_N.device)[batch.position_N]
        x = self.embed(batch.ids_N)
        attend = batch.attention(compute_dtype(x))
        for block in self.blocks:
            x, _ = block(x, rotation, attend)
        return self.norm(x)

    def _check_length(self, T: int) -> None:
        if self.config.max_seq_len < T:
            raise ConfigError(
                f"a sequence of {T} tokens; the model takes {self.config.max_seq_len} (model.max_seq_len)"
            )

    def prefill(self, input_ids_BT: Tensor, length_B: Tensor, cache: LatentCache) -> Tensor:
        """Reads right-padded prompts of `length_B` tokens into the cache; logits_BV of each row's last token."""
        states_BTD = self.hidden(input_ids_BT, cache=cache).states_BTD
        return self.head(states_BTD[torch.arange(len(length_B), device=length_B.device), length_B - 1])

    def decode(self, token_B: Tensor, position_B: Tensor, cache: LatentCache) -> Tensor:
        """One token per row at `position_B`; logits_BV of the next."""
        at = Cursor(position_B, cache)
        x = self.embed(token_B)
        rotation_BR = rope_table(self.config, token_B.device)[position_B]
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            assert isinstance(block, Block)
            x = block.decode(x, rotation_BR, layer, at)
        return self.head(self.norm(x))

    def new_cache(self, rows: int, capacity: int) -> LatentCache:
        """An empty cache in the weights' dtype and on their device."""
        weight = self.embed.weight
        return LatentCache(self.config, rows, capacity, dtype=weight.dtype, device=weight.device)

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]
