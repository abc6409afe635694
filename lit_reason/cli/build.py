"""From a key of the tree to the object that its node describes."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_reason.config.check import check_config
from lit_reason.config.instantiate import instantiate
from lit_reason.config.resolve import to_plain
from lit_reason.errors import ConfigError


def build(cfg: DictConfig, key: str, **kwargs: Any) -> Any:
    """The object that the node `key` describes; `kwargs` win over the node's own."""
    node = _node(cfg, key)
    if kwargs:
        return instantiate(node, allow_targets=cfg.allow_targets, **kwargs)
    return instantiate({key: node}, allow_targets=cfg.allow_targets)[key]  # so that an error names the key


def checked_build(cfg: DictConfig, key: str) -> Any:
    """The same, after holding the node's keys and values against the signature."""
    check_config({key: _node(cfg, key)}, cfg.allow_targets)
    return build(cfg, key)


def _node(cfg: DictConfig, key: str) -> dict[str, Any]:
    node = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(node):
        raise ConfigError(f"{key}={node!r}; valid: a node with a _target_, as in the YAMLs of conf/{key.split('.')[0]}")
    return to_plain(node)
