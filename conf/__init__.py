"""Hydra groups; a file of this name is what makes `pkg://lit_reason.conf` a search path."""
