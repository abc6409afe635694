"""Pretrained models: list, info, load, verify, save."""

from lit_reason.zoo.manifest import default_shelf
from lit_reason.zoo.store import Verified, ZooModel, info, list_models, load, save, verify

__all__ = ["Verified", "ZooModel", "default_shelf", "info", "list_models", "load", "save", "verify"]
