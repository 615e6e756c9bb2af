"""Quantized linear layers: reading the published layouts, and making checkpoints in them."""
