"""The weight push to an engine, and the proof that it arrived."""

from lit_reason.sync.proof import Proof, ProvenEngine

__all__ = ["Proof", "ProvenEngine"]
