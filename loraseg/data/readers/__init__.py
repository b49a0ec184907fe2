"""Readers of data sets on disk, one module a layout."""

__all__: list[str] = []
