"""The command line ``loraseg``. Jobs that run on Ray are in ``jobs``."""

from loraseg.cli.entry import main

__all__ = ["main"]
