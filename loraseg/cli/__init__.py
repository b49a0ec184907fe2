"""The tool for a person: ``loraseg --help``. Jobs for a cluster are in ``jobs``."""

from loraseg.cli.entry import main

__all__ = ["main"]
