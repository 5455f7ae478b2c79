"""Structural fuzz: mutated files must end in success or in one sentence. See `tests/fuzz/__main__.py` for long runs."""
