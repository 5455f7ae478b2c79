"""Functions that several distillation methods share: pure, on tensors, batched over images."""
