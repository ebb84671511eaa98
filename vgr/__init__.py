"""vgr: train, fine-tune and measure video world models."""

__version__ = "0.1.0"
