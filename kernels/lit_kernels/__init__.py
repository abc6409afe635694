"""Triton kernels of lit_reason, each with its plain-torch reference. Needs torch (and triton) only."""
