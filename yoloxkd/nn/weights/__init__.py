"""Checkpoints of detectors: reading, published files, key maps."""
