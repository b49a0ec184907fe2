"""Probes: which layers of a generator matter, as reports that selections are made from."""

__all__: list[str] = []
