"""Bilinear upsampling by two with aligned corners, into a concatenation: ``cat([*row, up(y)])``."""
