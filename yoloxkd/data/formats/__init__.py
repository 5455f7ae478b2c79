"""Annotation formats: one file a format."""
