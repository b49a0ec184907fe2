"""The public names of the package: a fixed list, loaded on first use."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loraseg

NAMES = [
    "Adapter",
    "AsyncClient",
    "Client",
    "LabelSpace",
    "Library",
    "LorasegError",
    "Segmenter",
    "ShardStream",
    "SplitDataset",
    "concat_lora",
    "load_adapter",
    "load_generator",
    "load_segmenter",
    "mixing_weights",
    "open_dataset",
    "train_adapter",
]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_public_names_are_pinned():
    assert loraseg.__all__ == NAMES
    assert set(NAMES) <= set(dir(loraseg))


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_is_documented_and_says_where_it_lives(name):
    value = getattr(loraseg, name)
    assert inspect.getdoc(value)
    assert value.__name__ == name


def test_type_checkers_see_the_same_names_from_the_same_modules():
    tree = ast.parse(Path(loraseg.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {
        alias.name: statement.module for statement in block.body for alias in statement.names
    }
    assert imports == {name: loraseg._MODULES[name] for name in NAMES}


def test_the_docstring_and_the_guide_name_every_package():
    root = Path(loraseg.__file__).parent
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    guide = (root.parent / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    in_docstring = set(re.findall(r"\w+", loraseg.__doc__))
    assert packages <= in_docstring
    assert packages <= set(re.findall(r"^  (\w+)/", guide, re.MULTILINE))


def test_import_loads_no_heavy_library():
    heavy = "{'torch', 'pyarrow', 'ray', 'numpy', 'diffusers', 'pydantic'}"
    result = run(f"import sys, loraseg; dir(loraseg); print(sorted({heavy} & set(sys.modules)))")
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_the_client_loads_neither_torch_nor_ray():
    result = run(
        "import sys, loraseg, loraseg.client.health; loraseg.Client; loraseg.AsyncClient; "
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_star_import_gives_every_public_name():
    result = run(f"from loraseg import *; print(set({NAMES}) <= set(globals()))")
    assert result.stdout == "True\n", result.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'load_segmentor'"):
        loraseg.load_segmentor  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from loraseg import nothing  # noqa: F401
