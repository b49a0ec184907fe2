"""Probes: reports on which layers of a generator matter, from which recipes select layers."""

__all__: list[str] = []
