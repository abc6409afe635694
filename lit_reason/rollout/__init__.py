"""Generation: the engine protocol, the builtin engine, sampling."""

from lit_reason.rollout.builtin import BuiltinEngine
from lit_reason.rollout.engine import Engine, Progress
from lit_reason.rollout.sampling import Sampling, request_seed

__all__ = ["BuiltinEngine", "Engine", "Progress", "Sampling", "request_seed"]
