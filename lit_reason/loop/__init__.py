"""The rollout loop: the one module outside the import order; it is handed every stage as a callable."""

from lit_reason.loop.rollout_loop import RolloutLoop
from lit_reason.loop.shape import Round, RoundShape, Stages

__all__ = ["RolloutLoop", "Round", "RoundShape", "Stages"]
