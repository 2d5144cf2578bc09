"""Benchmarks of the fused operations: each number stands behind a check of correctness (``ops.py`` first)."""
