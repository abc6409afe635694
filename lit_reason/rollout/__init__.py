"""Generation: the engine protocol, the builtin engine, sampling."""

from lit_reason.rollout.builtin import BuiltinEngine
from lit_reason.rollout.builtin_process import BuiltinProcess
from lit_reason.rollout.engine import Engine, Progress, Provable
from lit_reason.rollout.replicas import Replicas
from lit_reason.rollout.sampling import Sampling, request_seed
from lit_reason.rollout.vllm import VLLMEngine
from lit_reason.rollout.vllm_server import VLLMServerEngine

__all__ = [
    "BuiltinEngine",
    "BuiltinProcess",
    "Engine",
    "Progress",
    "Provable",
    "Replicas",
    "Sampling",
    "VLLMEngine",
    "VLLMServerEngine",
    "request_seed",
]
