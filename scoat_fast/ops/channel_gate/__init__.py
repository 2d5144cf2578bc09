"""Squeeze-and-excitation: ``x * sigmoid(W2 relu(W1 mean(x)))``."""
