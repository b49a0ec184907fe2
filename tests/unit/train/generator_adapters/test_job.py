"""Generator tasks: plan, run, kill, resume, publish, report."""

import dataclasses
import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from loraseg.adapters import load_adapter
from loraseg.adapters.attention_mix import decode_attention_mix
from loraseg.adapters.peft_io import ATTENTION_MIX_FILE
from loraseg.backbones.diffusion import load_diffusion
from loraseg.data import digest_samples, open_dataset
from loraseg.errors import AdapterNotFoundError, ConfigError, DatasetError
from loraseg.library import BaseModelInfo, Library
from loraseg.storage import open_store
from loraseg.synth.region_attention import RegionControl, alpha_module_names
from loraseg.train.generator_adapters.report import SampleGrid
from loraseg.train.generator_adapters.task import ActiveAdapter
from loraseg.train.tasks import group_tasks, plan_task, train_adapter, train_adapter_group
from tests.unit.train.interruption import Interrupted
from tests.unit.train.tiny_generator import tiny_generator_task, tiny_recipe

PARAMETERS = 2 * sum(
    # q, out of the width; k, v from text of 16: blocks of width 8 three times, of 16 four times
    count * (2 * (width + width) + 2 * (16 + width))
    for width, count in ((8, 3), (16, 4))
) + (3 * 9 + 4 * 17)


def interrupt_at(step):
    def report(progress):
        if progress.phase == "train" and progress.step == step:
            raise Interrupted

    return report


def published(task):
    return Library(open_store(task.library)).load(task.name)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished task with sample grids, shared by tests that only read it."""
    recipe = tiny_recipe(grid={"every": 3, "masks": 2, "steps": 2})
    task = tiny_generator_task(tmp_path_factory.mktemp("done"), recipe=recipe)
    reports = []
    return task, train_adapter(task, reports.append), reports


def test_publishes_an_adapter_with_a_full_card(done):
    task, result, _ = done
    files, card = published(task)
    dataset = open_dataset(task.data)
    assert set(files) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "fusion.safetensors",
        "pytorch_lora_weights.safetensors",
        "kohya.safetensors",
    }
    adapter = load_adapter(files)
    assert adapter.digest == result.digest
    base = load_diffusion(task.base)
    assert (card.role, card.base) == ("generator", BaseModelInfo("pipeline", base.digest))
    assert adapter.base_digest == base.digest
    assert card.label_space == ("sky", "road", "car")
    assert (card.training.images, card.training.digest) == (
        4,
        digest_samples(dataset, dataset.samples("train")),
    )
    assert (card.recipe["rank"], card.recipe["loop"]["steps"]) == (2, 6)
    assert card.recipe["task_digest"] == plan_task(task).digest
    assert card.recipe["active"] == card.recipe["active_adapters"] == []
    assert card.parents == ()
    assert set(card.metrics) == {"train_loss", "val_loss", "val_loss_base"}
    assert card.metrics == result.metrics
    assert card.code_revision


def test_reports_every_step_and_phase(done):
    _, _, reports = done
    phases = [progress.phase for progress in reports]
    assert phases == ["encode", *["train"] * 6, "evaluate", "publish"]
    assert [p.step for p in reports if p.phase == "train"] == [1, 2, 3, 4, 5, 6]


def test_the_fusion_layers_fit_the_unet(done):
    task, _, _ = done
    state = decode_attention_mix(published(task)[0][ATTENTION_MIX_FILE])
    unet = load_diffusion(task.base).unet
    control = RegionControl(unet, alpha_modules=alpha_module_names(state.tensors), mode=state.mode)
    control.load_alphas(state.tensors)
    assert len(state.tensors) == 14


def test_the_report_shows_the_grids_and_needs_no_network(done):
    task, _, _ = done
    page = open_store(task.report_uri).get("fog.html").decode()
    assert page.count("data:image/png;base64,") == 2
    assert "After 3 steps" in page
    assert "After 6 steps" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "val_loss_base" in page


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A finished task without sample grids or validation split, with its report elsewhere."""
    folder = tmp_path_factory.mktemp("bare")
    recipe = tiny_recipe(loop={"steps": 2, "warmup_steps": 1})
    task = tiny_generator_task(folder, recipe=recipe, output=str(folder / "out"))
    shutil.rmtree(folder / "fog" / "images" / "val")
    return folder / "out", train_adapter(task)


def test_a_report_without_sample_grids_says_so(bare):
    page = open_store(str(bare[0])).get("fog.html").decode()
    assert "None: the recipe sets no interval (grid.every)." in page


def test_without_a_validation_split_there_is_the_training_loss_only(bare):
    assert set(bare[1].metrics) == {"train_loss"}


def test_a_grid_shows_masks_images_and_what_is_generated(tmp_path):
    recipe = tiny_recipe(grid={"every": 3, "masks": 2, "steps": 2})
    task = tiny_generator_task(tmp_path, recipe=recipe)
    with pytest.raises(Interrupted):
        train_adapter(task, interrupt_at(5))
    store = open_store(task.checkpoints)
    (key,) = [key for key in store.list("fog/") if key.endswith(".png")]
    picture = np.asarray(Image.open(io.BytesIO(store.get(key))))
    assert key.endswith("pictures/000000003.png")
    assert picture.shape[1] == 4 * (96 + 4)
    assert picture.shape[0] > 2 * (96 + 16)


def test_a_grid_of_crops_shows_each_image_once(tmp_path, monkeypatch):
    shown = []

    def draw(grid, kept):
        shown.append([name for name, _, _ in grid.examples])
        return b"a picture"

    monkeypatch.setattr(SampleGrid, "render", draw)
    view = {"size": [16, 16], "fit": "crop", "crops": 3}
    recipe = tiny_recipe(view=view, grid={"every": 6, "masks": 2}, loop={"steps": 6})
    train_adapter(tiny_generator_task(tmp_path, recipe=recipe))
    ((first, second),) = shown
    assert first != second


@pytest.mark.parametrize("kills", [(1,), (3, 5)])
def test_a_killed_task_resumes_to_the_same_bytes(done, tmp_path, kills):
    task = tiny_generator_task(tmp_path)
    for step in kills:
        with pytest.raises(Interrupted):
            train_adapter(task, interrupt_at(step))
    result = train_adapter(task)
    assert result.resumed_from_step == max(kills) // 2 * 2
    assert result.digest == done[1].digest
    assert result.metrics == done[1].metrics
    assert published(task)[0] == published(done[0])[0]
    assert not list(open_store(task.checkpoints).list("fog/"))


def test_a_task_killed_while_scoring_does_not_train_again(done, tmp_path):
    task = tiny_generator_task(tmp_path)

    def kill_when_scoring(progress):
        if progress.phase == "evaluate":
            raise Interrupted

    with pytest.raises(Interrupted):
        train_adapter(task, kill_when_scoring)
    result = train_adapter(task)
    assert (result.resumed_from_step, result.digest) == (6, done[1].digest)
    assert result.metrics == done[1].metrics


def test_a_published_task_is_skipped_unless_something_changed(done):
    task, first, _ = done
    again = train_adapter(task, interrupt_at(1))
    assert (again.skipped, again.version, again.digest) == (True, 1, first.digest)
    often = tiny_recipe(loop={"checkpoint_every": 1}, grid={"every": 1})
    assert plan_task(dataclasses.replace(task, recipe=often)).published
    for change in ({"seed": 1}, {"recipe": tiny_recipe(rank=3)}, {"images": 2}):
        assert not plan_task(dataclasses.replace(task, **change)).published
    fusion = tiny_recipe(fusion={"mode": "pooled"})
    assert not plan_task(dataclasses.replace(task, recipe=fusion)).published


def test_a_plan_describes_the_task(done):
    task, _, _ = done
    plan = plan_task(dataclasses.replace(task, images=3, name="other"))
    assert (plan.name, plan.images, plan.parameters, plan.steps, plan.published) == (
        "other",
        3,
        PARAMETERS,
        6,
        False,
    )


def test_stock_diffusers_loads_it_and_runs_with_it(done, tmp_path):
    task, _, _ = done
    files, _ = published(task)
    name = "pytorch_lora_weights.safetensors"
    (tmp_path / name).write_bytes(files[name])
    pipeline = StableDiffusionPipeline.from_pretrained(
        task.base, safety_checker=None, requires_safety_checker=False
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name=name)
    layers = {n: m for n, m in pipeline.unet.named_modules() if hasattr(m, "lora_A")}
    adapter = load_adapter(files)
    assert set(layers) == set(adapter.pairs)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for module, pair in adapter.pairs.items():
        layer, inputs = layers[module], x[:, : pair.down.shape[1]]
        dense = torch.nn.functional.linear(inputs, layer.base_layer.weight, layer.base_layer.bias)
        torch.testing.assert_close(layer(inputs), dense + inputs @ pair.delta().T)


def test_nothing_is_encoded_twice(done, monkeypatch):
    task, _, _ = done
    short = tiny_recipe(rank=1, loop={"steps": 1, "warmup_steps": 0})
    other = dataclasses.replace(task, name="second", recipe=short)
    monkeypatch.setattr("loraseg.backbones.diffusion.DiffusionBase.encode_images", None)
    monkeypatch.setattr("loraseg.backbones.diffusion.DiffusionBase.encode_text", None)
    assert not train_adapter(other).skipped


@pytest.fixture(scope="module")
def with_active(done, tmp_path_factory):
    """A finished task on a frozen adapter without attention mix, in a separate library."""
    folder = tmp_path_factory.mktemp("active")
    shutil.copytree(done[0].data, folder / "fog")
    plain = tiny_recipe(draws={"regions": False}, targets="self")
    train_adapter(tiny_generator_task(folder, "style", recipe=plain))
    task = tiny_generator_task(
        folder,
        "control",
        recipe=tiny_recipe(grid={"every": 6, "masks": 1, "steps": 1}),
        active=(ActiveAdapter(name="style", weight=0.5),),
    )
    return task, train_adapter(task)


def test_the_card_lists_the_frozen_adapters(with_active, done):
    task, result = with_active
    style = Library(open_store(task.library)).entry("style")
    card = published(task)[1]
    assert card.parents == (style.digest,)
    assert card.recipe["active"] == [
        {"name": "style", "version": 1, "digest": style.digest, "weight": 0.5}
    ]
    assert card.recipe["active_adapters"] == [style.digest]
    alone = dataclasses.replace(task, active=())
    assert plan_task(alone).digest != plan_task(task).digest
    assert result.digest != done[1].digest
    assert card.metrics["val_loss"] != pytest.approx(card.metrics["val_loss_base"], abs=1e-9)


def test_sample_grids_are_drawn_with_frozen_adapters(with_active):
    page = open_store(with_active[0].report_uri).get("control.html").decode()
    assert page.count("data:image/png") == 1


def test_adapters_that_cannot_be_frozen_are_refused(with_active):
    for name, error, reason in (
        ("absent", AdapterNotFoundError, "no adapter 'absent'"),
        ("control", ConfigError, "has attention-mix layers of its own"),
    ):
        task = dataclasses.replace(with_active[0], active=(ActiveAdapter(name=name),))
        with pytest.raises(error, match=reason):
            plan_task(task)


def spoil(folder, name, mask):
    Image.fromarray(mask).save(folder / "fog" / "masks" / name / "0.png")


@pytest.mark.parametrize(
    ("split", "mask", "reason"),
    [
        ("train", np.full((64, 64), 9, np.uint8), "0.png"),
        ("val", np.full((64, 64), 255, np.uint8), "every pixel is ignored"),
        ("train", np.zeros((32, 64), np.uint8), "64 x 32 pixels"),
    ],
)
def test_broken_masks_fail_before_anything_is_encoded(tmp_path, split, mask, reason):
    task = tiny_generator_task(tmp_path)
    spoil(tmp_path, split, mask)
    reports = []
    for act in (plan_task, lambda task: train_adapter(task, reports.append)):
        with pytest.raises(DatasetError, match=reason):
            act(task)
    assert reports == []


def test_an_error_is_the_outcome_of_its_task(tmp_path):
    task = tiny_generator_task(tmp_path)
    bad = dataclasses.replace(task, recipe=tiny_recipe(view={"size": [33, 32]}))
    with pytest.raises(ConfigError, match="multiples of 4"):
        train_adapter(bad)
    assert group_tasks([task, bad], max_size=8) == [(0,), (1,)]
    (outcome,) = train_adapter_group([bad])
    assert isinstance(outcome, ConfigError)


def test_the_average_is_published(done, tmp_path):
    task = tiny_generator_task(tmp_path, recipe=tiny_recipe(loop={"ema_decay": 0.5}))
    with pytest.raises(Interrupted):
        train_adapter(task, interrupt_at(5))
    store = open_store(task.checkpoints)
    (key,) = [key for key in store.list("fog/") if key.endswith(".safetensors")]
    state = safetensors.torch.load(store.get(key))
    assert any(name.startswith("average/") for name in state)
    assert train_adapter(task).digest != done[1].digest


def test_an_order_per_dataset_does_not_depend_on_the_name(tmp_path):
    short = tiny_recipe(loop={"steps": 1, "warmup_steps": 0})
    task = tiny_generator_task(tmp_path, images=2, recipe=short)
    shutil.rmtree(tmp_path / "fog" / "images" / "val")
    results = [
        train_adapter(dataclasses.replace(task, name=name, data_order=order)).digest
        for name, order in (("one", "per_dataset"), ("two", "per_dataset"), ("two", "per_adapter"))
    ]
    assert results[0] == results[1] != results[2]


def test_planning_segmenters_loads_no_diffusers():
    code = (
        "import sys, jobs.train_adapters\n"
        "assert not {'diffusers', 'transformers'} & sys.modules.keys(), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
