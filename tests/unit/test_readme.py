"""The Python example of the README runs as printed; commands, links and paths are valid."""

import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loraseg import config
from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.peft_io import to_peft_files
from loraseg.adapters.targets.unet import select_projections
from loraseg.backbones.clip import load_clip
from loraseg.backbones.diffusion import load_diffusion
from loraseg.cli import entry
from loraseg.inference import generation
from loraseg.library import AdapterCard, BaseModelInfo, Library
from loraseg.miniature.world.captions import LABEL_NAMES
from loraseg.miniature.world.dataset import write_world
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.synth.sampling import SamplingConfig
from loraseg.train.segmenter_adapters.recipes import RECIPES
from tests.unit.tiny import publish

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "loraseg").glob("*/README.md"))]


@pytest.fixture
def quickstart_folder(tmp_path, monkeypatch):
    """The files that the example reads, at the quickstart's paths; short training and sampling."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    write_world(tmp_path / "runs/quickstart/world", ("night", "snow"), train=16, val=2)
    publish(
        tmp_path / "runs/quickstart/library",
        load_base("miniature"),
        load_clip("miniature"),
        names=("day", "night"),
    )
    publish_generator(tmp_path / "runs/generators")
    recipe = RECIPES["miniature"]()
    short = replace(recipe, loop=replace(recipe.loop, steps=10, warmup_steps=2))
    monkeypatch.setitem(RECIPES, "miniature", lambda: short)
    monkeypatch.setattr(generation, "SamplingConfig", lambda: SamplingConfig(steps=4))
    return tmp_path


def publish_generator(uri):
    base = load_diffusion("miniature")
    random = torch.Generator().manual_seed(0)
    pairs = {}
    for name in select_projections(base.unet, "cross"):
        d_out, d_in = base.unet.get_submodule(name).weight.shape
        down = torch.randn(2, d_in, generator=random) / d_in
        pairs[name] = LoraPair(down, torch.randn(d_out, 2, generator=random) / d_out, 1.0)
    info = BaseModelInfo(base.name, base.digest)
    card = AdapterCard(name="snow-images", role="generator", base=info, label_space=LABEL_NAMES)
    files = to_peft_files(pairs, base_digest=base.digest)
    Library.open(str(uri)).publish("snow-images", files, card)


def test_the_python_example_runs(quickstart_folder):
    [example] = re.findall(r"```python\n(.*?)```", PAGES[0].read_text("utf-8"), re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)

    result = names["result"]
    assert result.label_map.dtype == np.uint8
    assert result.label_map.shape == names["image"].shape[:2]
    assert {used.name for used in result.explanation.adapters} == {"day", "night"}

    trained = names["trained"]
    assert trained.card.training.images == 16
    assert "miou" in trained.card.metrics
    [entry] = Library.open("runs/adapters").entries()
    assert (entry.name, entry.digest) == ("snow", trained.adapter.digest)

    assert len(names["images"]) == 5
    for generated in names["images"]:
        assert generated.image.shape == (*names["mask"].shape, 3)
        assert generated.label.shape == names["mask"].shape


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_and_named_files_exist(page):
    text = page.read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    local = {page.parent / link for link in links if "://" not in link}
    named = set(re.findall(r"`((?:loraseg|actors|jobs|tests)/[\w./]+)`", text))
    jobs = {f"jobs/{name}.py" for name in re.findall(r"\bjobs\.([a-z_]+)\b", text)} - {"jobs/x.py"}
    paths = [*local, *(ROOT / name for name in named | jobs)]
    assert [str(path) for path in paths if not path.exists()] == []


def shell_commands(page):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_job_commands_have_known_settings(page):
    for words in shell_commands(page):
        name = next((word for word in words if word.startswith("jobs.")), None)
        if name is None:
            continue
        known = config._keys(importlib.import_module(name).Config)
        given = [word.partition("=")[0].partition(".")[0] for word in words if "=" in word]
        assert [key for key in given if key not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_loraseg_commands_are_valid(page):
    for words in shell_commands(page):
        if words and words[0].endswith("loraseg"):
            assert callable(entry._parser().parse_args(words[1:]).command)


def test_the_readme_is_short():
    assert len(PAGES[0].read_text("utf-8").splitlines()) <= 200
