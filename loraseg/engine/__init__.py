"""Bring models and adapter libraries together: for evaluation, service and command line.

It stands above ``library`` and ``segment``, which do not know each other.
"""

__all__ = ["AttentionLora", "Equipment", "Precision", "Wanted", "equip"]

from loraseg.engine.assemble import AttentionLora, Equipment, Precision, Wanted, equip
