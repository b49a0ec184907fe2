"""Recipes by name, with overrides."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from loraseg import config as configuration
from loraseg.errors import ConfigError

__all__ = ["deep_merge", "recipe_with_overrides"]

RecipeT = TypeVar("RecipeT")


def recipe_with_overrides(
    recipes: Mapping[str, RecipeT], name: str, overrides: Sequence[Mapping[str, Any]]
) -> RecipeT:
    """Return a recipe of a table with some fields changed.

    Args:
        recipes: Recipes by name.
        name: A key of ``recipes``.
        overrides: Plain values by field, nested fields as nested mappings; a later one wins.

    Raises:
        ConfigError: There is no such recipe or field, or a value is out of range.
    """
    if name not in recipes:
        raise ConfigError(f"recipe: got {name!r}, known: {', '.join(recipes)}")
    recipe = recipes[name]
    values = deep_merge(configuration.to_dict(recipe), *overrides)
    return configuration.build(type(recipe), values, where=f"recipe {name}")


def deep_merge(values: Mapping[str, Any], *overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge overrides into plain values, nested mappings key by key; a later override wins."""
    merged = dict(values)
    for key, change in (item for changes in overrides for item in changes.items()):
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(change, Mapping):
            inner = cast(Mapping[str, Any], old), cast(Mapping[str, Any], change)
            merged[key] = deep_merge(*inner)
        else:
            merged[key] = change
    return merged
