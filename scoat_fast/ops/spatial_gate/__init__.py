"""Spatial gating into a concatenation, ``cat([*row, (1 + M) * up(y)])``, with its channel means."""
