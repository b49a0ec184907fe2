"""A tiny generator with its data in memory, or as files for whole tasks."""

import functools
import tempfile
from pathlib import Path

from loraseg.backbones.diffusion import DiffusionBase
from loraseg.data import open_dataset
from loraseg.storage import open_store
from loraseg.synth.conditioning import Conditioner
from loraseg.train.generator_adapters.crops import CroppedImages
from loraseg.train.generator_adapters.latents import TensorCache
from loraseg.train.generator_adapters.recipes import named_generator_recipe
from loraseg.train.generator_adapters.samples import CropConditions, DenoisingData
from loraseg.train.generator_adapters.task import GeneratorAdapterTask
from tests.tiny_training import write_domain
from tests.unit.tiny_diffusion import tiny_sd, tiny_sdxl

RECIPE = {
    "rank": 2,
    "learning_rate": 0.01,
    "batch_size": 2,
    "view": {"size": [32, 32]},
    "loop": {"steps": 6, "warmup_steps": 2, "checkpoint_every": 2},
}


def tiny_recipe(**changes):
    return named_generator_recipe("matchmask-miniature", RECIPE, changes)


def tiny_generator(kind="sd", prediction="epsilon"):
    pipeline = tiny_sd(prediction) if kind == "sd" else tiny_sdxl(prediction)
    base = DiffusionBase.from_pipeline(pipeline, name="tiny", digest="ab" * 32)
    base.unet.requires_grad_(False)
    return base


def denoising_data(folder, base, recipe, *, split="train", seed=0, keys=("t",)):
    """Data of the domain in a folder, which is written if it is missing."""
    if not (folder / "fog").exists():
        write_domain(folder / "fog", "fog")
    dataset = open_dataset(folder / "fog")
    views = CroppedImages(dataset, dataset.samples(split), recipe.view, seed=seed, keys=keys)
    conditioner = Conditioner(base.tokenizers, dataset.label_space, recipe.conditioning)
    conditions = CropConditions(views, conditioner)
    cache = TensorCache(open_store(str(folder / "cache")))
    return DenoisingData.prepare(base, views, conditions, recipe.draws, cache)


@functools.cache
def _pipeline_files():
    with tempfile.TemporaryDirectory() as folder:
        tiny_sd().save_pretrained(folder)
        return {
            path.relative_to(folder): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file()
        }


def write_pipeline(folder):
    """Write the pipeline of ``tiny_generator`` as an ordinary diffusers folder."""
    for name, data in _pipeline_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tiny_generator_task(folder, name="fog", *, recipe=None, **changes):
    """Write the missing files below ``folder`` and return a task on them."""
    if not (folder / "pipeline").exists():
        write_pipeline(folder / "pipeline")
    if not (folder / "fog").exists():
        write_domain(folder / "fog", "fog")
    return GeneratorAdapterTask(
        **{
            "name": name,
            "data": str(folder / "fog"),
            "base": str(folder / "pipeline"),
            "recipe": recipe or tiny_recipe(),
            "library": str(folder / "library"),
            "checkpoints": str(folder / "checkpoints"),
            **changes,
        }
    )
