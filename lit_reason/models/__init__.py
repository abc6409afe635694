"""The model: DeepSeek-V3's mixture of experts with multi-head latent attention, under muP."""

from lit_reason.models.cache import LatentCache
from lit_reason.models.config import Base, ModelConfig, Yarn
from lit_reason.models.hf_policy import HFConfig, HFModel
from lit_reason.models.mup import Role, parameter_roles
from lit_reason.models.protocol import CausalLM
from lit_reason.models.transformer import Transformer

__all__ = [
    "Base", "CausalLM", "HFConfig", "HFModel", "LatentCache", "ModelConfig", "Role", "Transformer", "Yarn",
    "parameter_roles",
]  # fmt: skip
