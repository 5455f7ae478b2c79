"""SOLO: instance masks by locations."""
