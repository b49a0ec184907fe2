"""Training of many adapters: in one process or many, with loraseg or peft, in groups or alone."""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
from torch import nn

from loraseg.adapters.targets.catseg import target_modules
from loraseg.compat import prepare_torchvision
from loraseg.data import Dataset, open_dataset
from loraseg.miniature.world.dataset import write_world
from loraseg.segment.open_vocabulary.base import SegmentationBase, load_base
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.train.segmenter_adapters.recipes import AdapterRecipe, named_recipe
from loraseg.train.segmenter_adapters.samples import (
    TrainingImages,
    encode_image_features,
    encode_text,
    segmentation_loss,
)
from loraseg.train.segmenter_adapters.training import GroupMember, train_group
from loraseg.train.tasks import SegmenterAdapterTask, train_adapter
from tests.bench.harness import interleave, ratio, setting, single_thread

DOMAINS = ("snow", "night", "thermal")
RANKS = (4, 8, 12, 16)
STEPS = 12


def run() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name, single_thread():
        folder = Path(name)
        write_world(folder, DOMAINS, train=24, val=8)
        processes, same_processes = _processes(folder)
        data = open_dataset(folder / "night")
        base = load_base()
        steps = _steps(base, data)
        together, same_group = _groups(base, data, _sweep("miniature", steps=2), rounds=2)
        large, same_large = _groups(
            _vit_b_base(base), data, _sweep("semla-acdc", steps=1), rounds=1
        )
    each = [processes["each"] / len(DOMAINS), processes["one"] / len(DOMAINS)]
    return {
        "bench": "training",
        "ratios": {
            "one_process_vs_process_each": round(processes["one"] / processes["each"], 4),
            "step_vs_before": ratio(steps, "ours_bf16", "peft_bf16"),
            "step_vs_before_fp32": ratio(steps, "ours_fp32", "peft_fp32"),
            "shared_prefix_vs_alone": ratio(together, "group", "alone"),
            "shared_prefix_vs_alone_vit_b": ratio(large, "group", "alone"),
        },
        "checks": {"bytes_equal": same_processes and same_group and same_large},
        "setting": setting(
            {**steps, **together, **{f"{key}_vit_b": value for key, value in large.items()}},
            adapters=len(DOMAINS),
            steps=STEPS,
            group=len(RANKS),
            process_each_s_per_adapter=round(each[0], 2),
            one_process_s_per_adapter=round(each[1], 2),
        ),
    }


def train(folder: str, library: str, *names: str) -> None:
    """Train and publish one adapter per domain, like a worker; the processes below call it."""
    for name in names:
        recipe = named_recipe("miniature", {"loop": {"steps": STEPS}})
        paths = {"data": f"{folder}/{name}", "library": library, "checkpoints": f"{library}-state"}
        digest = train_adapter(SegmenterAdapterTask(name=name, recipe=recipe, **paths)).digest
        sys.stdout.write(f"{name} {digest}\n")


def _processes(folder: Path) -> tuple[dict[str, float], bool]:
    """Return CPU seconds of all adapters, imports included, and whether their bytes are equal."""
    calls = {"one": [DOMAINS], "each": [(name,) for name in DOMAINS]}
    seconds: dict[str, float] = {}
    printed: dict[str, list[str]] = {}
    for kind, groups in calls.items():
        started = _children_s()
        printed[kind] = [
            line for names in groups for line in _train_in_process(folder, kind, names)
        ]
        seconds[kind] = _children_s() - started
    return seconds, printed["one"] == printed["each"]


def _train_in_process(folder: Path, kind: str, names: Sequence[str]) -> list[str]:
    code = "import sys; from tests.bench.training import train; train(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), str(folder / f"library-{kind}"), *names]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _steps(base: SegmentationBase, data: Dataset) -> dict[str, list[float]]:
    """Return CPU seconds of three steps: of loraseg, and with peft's layers."""
    rivals = {}
    for precision in ("bf16", "fp32"):
        recipe = named_recipe("miniature", {"loop": {"steps": 3, "precision": precision}})
        rivals[f"ours_{precision}"] = lambda recipe=recipe: _together(base, data, [recipe])
        rivals[f"peft_{precision}"] = _peft_steps(data, recipe)
    return interleave(rivals, rounds=3)


def _images(data: Dataset, recipe: AdapterRecipe) -> TrainingImages:
    return TrainingImages(data, data.samples("train"), recipe.augment, keys=("bench",))


def _together(base: SegmentationBase, data: Dataset, recipes: Sequence[AdapterRecipe]):
    members = [GroupMember(recipe=recipe) for recipe in recipes]
    images = _images(data, recipes[0])
    return train_group(base, images, data.label_space.names, members)


def _peft_steps(data: Dataset, recipe: AdapterRecipe) -> Callable[[], None]:
    prepare_torchvision()
    base = load_base()
    names = list(target_modules(base.model, recipe.targets))
    config = peft.LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=names)
    peft.LoraModel(base.model, config, "default")
    parameters = [p for p in base.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=0.0)
    images, tokens = _images(data, recipe), base.tokenize(data.label_space.names)
    precision = recipe.loop.precision

    def steps() -> None:
        for step in range(recipe.loop.steps):
            pixels, labels = images.batch(step, recipe.batch_size)
            side, text = (
                encode_image_features(base, pixels, precision),
                encode_text(base, tokens, precision),
            )
            optimizer.zero_grad(set_to_none=True)
            segmentation_loss(base, text, side, labels, precision=precision).backward()
            nn.utils.clip_grad_norm_(parameters, recipe.loop.clip_norm)
            optimizer.step()

    return steps


def _sweep(name: str, *, steps: int) -> list[AdapterRecipe]:
    shared = {"targets": "aggregator", "loop": {"steps": steps, "warmup_steps": 0}}
    if name != "miniature":
        shared["batch_size"] = 1
    return [named_recipe(name, shared, {"rank": rank}) for rank in RANKS]


def _groups(
    base: SegmentationBase, data: Dataset, recipes: Sequence[AdapterRecipe], *, rounds: int
) -> tuple[dict[str, list[float]], bool]:
    """Return CPU seconds of the adapters of a sweep, and whether their bytes are equal."""

    latest = {}

    def group() -> None:
        latest["group"] = _together(base, data, recipes)

    def alone() -> None:
        latest["alone"] = [_together(base, data, [recipe])[0] for recipe in recipes]

    times = interleave({"group": group, "alone": alone}, rounds=rounds)
    same = all(
        torch.equal(pair.down, other.pairs[name].down)
        and torch.equal(pair.up, other.pairs[name].up)
        for one, other in zip(latest["group"], latest["alone"], strict=True)
        for name, pair in one.pairs.items()
    )
    return times, same


def _vit_b_base(like: SegmentationBase) -> SegmentationBase:
    """Return a CAT-Seg B/16 at 384 pixels with random weights and the tokenizer of ``like``."""
    torch.manual_seed(0)
    model = CATSeg(CATSegConfig(vocab_size=512)).eval()
    return SegmentationBase(name="vit-b", digest="0" * 64, model=model, tokenizer=like.tokenizer)
