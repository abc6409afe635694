"""Weight push to an engine, and its proof."""

from lit_reason.sync.checksum import checksum

__all__ = ["checksum"]
