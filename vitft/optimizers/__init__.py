"""Optimizers, learning rates and the average of weights: gradients in, moved weights out."""
