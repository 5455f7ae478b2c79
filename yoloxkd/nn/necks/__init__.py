"""Necks: networks that mix the levels of a backbone."""
