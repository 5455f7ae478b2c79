"""Backbones: networks from images to feature maps, and the weights they start from."""
