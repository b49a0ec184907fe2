"""Measurements as ratios within one process: ``python -m tests.bench NAME`` prints JSON lines."""
