"""Configuration: safe instantiation, checks before any training, composition with readable errors."""

from lit_reason.config.check import check_config, check_run
from lit_reason.config.instantiate import instantiate
from lit_reason.config.stage import stage_config

__all__ = ["check_config", "check_run", "instantiate", "stage_config"]
