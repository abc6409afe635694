"""lit_reason: train models that reason, with PyTorch Lightning."""

__version__ = "0.1.0"
