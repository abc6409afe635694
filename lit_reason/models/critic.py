"""The critic of PPO: how much reward is still to come, at every sampled token.

Shapes: M targets that count, D width."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError
from lit_reason.models.adapters import adapters
from lit_reason.models.protocol import CausalLM


class Critic(nn.Module):
    """A value head on a trunk: its own, which starts as a copy of the policy's, or the policy's.

    The head starts at 0, so that the first advantages are those of no critic at all.

    Args:
        policy: what the trunk is copied from, or shared with.
        shared: read the policy's states, whose gradient then reaches the policy.
        lr_factor: times the learning rate of each of the critic's parameters.
    """

    def __init__(self, policy: nn.Module, shared: bool, lr_factor: float) -> None:
        super().__init__()
        if adapters(policy) and not shared:
            raise ConfigError(
                "critic.trunk=separate: the policy is frozen but for its adapters, and a second copy would be too. "
                "Type algorithm.critic.trunk=shared"
            )
        self.trunk = None if shared else copy.deepcopy(policy)
        output = next(cast(CausalLM, policy).head.parameters())  # (V, D)
        self.head = nn.Linear(output.shape[-1], 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.lr_factor = lr_factor
        shape = cast(CausalLM, policy).config
        self.width_ratio = shape.width / shape.base.width if hasattr(shape, "base") else 1.0  # muP's m
        if self.trunk is not None:
            tied = {id(module.weight) for module in self.trunk.modules() if isinstance(module, nn.Embedding)}
            for parameter in cast(CausalLM, self.trunk).head.parameters():
                parameter.requires_grad_(id(parameter) in tied)  # alone it says tokens, not values

    def forward(self, input_ids_BT: Tensor, counts_BT: Tensor, policy_states_MD: Tensor | None) -> Tensor:
        """values_M, float32: of the states before each target that counts, in row-major order."""
        if self.trunk is not None:
            states_MD = cast(CausalLM, self.trunk).states_at(input_ids_BT, counts_BT)
        else:
            assert policy_states_MD is not None
            states_MD = policy_states_MD
        with torch.autocast(states_MD.device.type, enabled=False):  # a value in bfloat16 has two digits
            return self.head(states_MD.float()).squeeze(-1)
