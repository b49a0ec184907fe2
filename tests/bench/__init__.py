"""Measurements as ratios within one process; ``python -m tests.bench NAME`` prints one JSON line."""
