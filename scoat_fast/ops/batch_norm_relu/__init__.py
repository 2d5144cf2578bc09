"""Batch normalisation with the batch's own statistics, a residual, and ReLU: ``relu(bn(x) + residual)``."""
