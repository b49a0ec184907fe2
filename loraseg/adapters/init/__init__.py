"""Initial LoRA pairs, one module per method.

A method is a function of the frozen model, the adapted layers, rank, alpha and seed. To add one,
write its module and its row in :data:`INITIALISERS`.
"""

from collections.abc import Mapping

from loraseg.adapters.init.initialiser import Initialiser, InitialPairs, ParameterGroup
from loraseg.adapters.init.lora import init_lora
from loraseg.errors import ConfigError

__all__ = [
    "INITIALISERS",
    "InitialPairs",
    "Initialiser",
    "ParameterGroup",
    "check_initialiser",
    "init_lora",
]

INITIALISERS: Mapping[str, Initialiser] = {
    "lora": init_lora,  # Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, sec. 4.1
}


def check_initialiser(name: str) -> None:
    """Check the ``init`` field of a recipe.

    Raises:
        ConfigError: The method is unknown.
    """
    if name not in INITIALISERS:
        raise ConfigError(f"init: got {name!r}, known: {', '.join(INITIALISERS)}")
