"""Per-image mixes in one batch against the bare model and a loop with peft, at ViT-B/16@384.

Layers, rank and K are SemLA's: q, k, v, c_fc, c_proj of the vision tower, rank 8, K = 5. The loop
repeats the official code for every image: ``add_weighted_adapter`` (cat), ``set_adapter``,
forward, ``delete_adapter``.
"""

import copy
import hashlib
import time
from collections.abc import Callable

import numpy as np
import peft
import torch
from torch import nn

from loraseg.adapters import Adapter, pack, target_modules
from loraseg.fuse import AdapterBank, Mix, fuse
from loraseg.fuse.merging import measure_table
from loraseg.seeding import numpy_generator, torch_generator
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.segment.open_vocabulary.predictor import Predictor
from tests.bench.harness import Times, interleave, ratio, setting, single_thread
from tests.bench.random_adapters import random_adapter

RANK, K, IMAGES, CLASSES = 8, 5, 8, 19
VISION = "sem_seg_head.predictor.clip_model.visual."
DECODER = "sem_seg_head.predictor.transformer."


def run() -> dict[str, object]:
    with single_thread(), torch.no_grad():
        torch.manual_seed(0)
        model = CATSeg(CATSegConfig()).eval().requires_grad_(False)
        before = _digest(model)
        small = [random_adapter(model, number, rank=RANK, prefix=VISION) for number in range(100)]
        mixes = [
            fuse([pack(small[(3 * i + j) % 20]) for j in range(K)], _weights(i))
            for i in range(IMAGES)
        ]
        bank = AdapterBank(model)
        tower, images = model.clip.visual, _noise("images", IMAGES, 3, 384, 384)

        def ours() -> torch.Tensor:
            with bank.use(mixes):
                return tower(images)[0]

        loops = {n: _PeftLoop(tower, small[:n], images) for n in (20, 100)}
        rivals: dict[str, Callable[[], object]] = {"base": lambda: tower(images), "ours": ours}
        times = interleave(
            {**rivals, "peft_n20": loops[20].run, "peft_n100": loops[100].run}, rounds=3
        )
        crops = _noise("crops", 5, 3, 384, 384)
        times |= _five_crops(bank, tower, crops, mixes[0])
        times |= _decoder(model, bank)
        booked = _bookkeeping(bank, mixes)
        ratios = {
            "one_crop_vs_base": ratio(times, "ours", "base"),
            "five_crop_vs_base": ratio(times, "five_crops", "five_crops_base"),
            "decoder_vs_base": ratio(times, "decoder", "decoder_base"),
            "vs_peft_loop_n20": ratio(times, "ours", "peft_n20"),
            "vs_peft_loop_n100": ratio(times, "ours", "peft_n100"),
            "bookkeeping_vs_peft_n20": round(booked / min(loops[20].booked), 4),
            "bookkeeping_vs_peft_n100": round(booked / min(loops[100].booked), 4),
            "rms_vs_f64_over_base": _accuracy(tower, bank, images[:1], mixes[0], VISION),
        }
        checks = {"base_bit_identical": before == _digest(model) and _thousand_mixes()}
    return {
        "bench": "fused_forward",
        "ratios": ratios,
        "checks": checks,
        "setting": setting(
            times,
            model="CAT-Seg ViT-B/16@384, random weights, fp32",
            images=IMAGES,
            k=K,
            rank=RANK,
            sites=len([n for n in target_modules(model) if n.startswith(VISION)]),
            bookkeeping_ms_per_image={
                "ours": round(1e3 * booked, 3),
                **{f"peft_n{n}": round(1e3 * min(loop.booked), 1) for n, loop in loops.items()},
            },
            merged_from_tokens=_crossings(),
        ),
    }


def _five_crops(bank: AdapterBank, tower: nn.Module, crops: torch.Tensor, mix: Mix) -> Times:
    def ours() -> None:
        with bank.use([mix]):
            tower(crops)

    return interleave({"five_crops_base": lambda: tower(crops), "five_crops": ours}, rounds=4)


def _decoder(model: CATSeg, bank: AdapterBank) -> Times:
    adapters = [
        pack(random_adapter(model, number, rank=RANK, prefix=DECODER)) for number in range(K)
    ]
    mix = fuse(adapters, _weights(0))
    config = model.config
    features = _noise("features", 1, config.embed_dim, config.grid, config.grid)
    text = _noise("text", 1, CLASSES, 1, config.embed_dim)
    first, second = config.guidance_dims
    guidance = (
        _noise("g1", 1, first, 2 * config.grid, 2 * config.grid),
        _noise("g2", 1, second, 4 * config.grid, 4 * config.grid),
    )

    def base() -> None:
        model.aggregator(features, text, guidance)

    def ours() -> None:
        with bank.use([mix]):
            model.aggregator(features, text, guidance)

    return interleave({"decoder_base": base, "decoder": ours}, rounds=9)


class _PeftLoop:
    """The official procedure for every image, with ``len(adapters)`` adapters loaded."""

    def __init__(self, tower: nn.Module, adapters: list[Adapter], images: torch.Tensor) -> None:
        names = [name.removeprefix(VISION) for name in adapters[0].pairs]
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
        wrapped = peft.get_peft_model(copy.deepcopy(tower), config, "0")
        for number in range(1, len(adapters)):
            wrapped.add_adapter(str(number), config)
        for number, adapter in enumerate(adapters):
            for name, pair in adapter.pairs.items():
                layer = wrapped.base_model.model.get_submodule(name.removeprefix(VISION))
                layer.lora_A[str(number)].weight.copy_(pair.down)
                layer.lora_B[str(number)].weight.copy_(pair.up * pair.scale)
        self._model, self._images = wrapped.eval(), images
        self.booked: list[float] = []

    def run(self) -> None:
        booked = 0.0
        for index, image in enumerate(self._images):
            names = [str((3 * index + j) % 20) for j in range(K)]
            started = time.process_time()
            self._model.add_weighted_adapter(names, _weights(index), "mix", combination_type="cat")
            self._model.set_adapter("mix")
            booked += time.process_time() - started
            self._model(image[None])
            started = time.process_time()
            self._model.delete_adapter("mix")
            booked += time.process_time() - started
        self.booked.append(booked / len(self._images))


def _bookkeeping(bank: AdapterBank, mixes: list[Mix]) -> float:
    """Return seconds per image without matrix products: choosing buffers, copying, attaching."""
    seconds: list[float] = []
    for turn in range(1, 6):
        turned = [*mixes[turn:], *mixes[:turn]]  # a different mix for every slot
        started = time.process_time()
        with bank.use(turned):
            pass
        seconds.append((time.process_time() - started) / len(mixes))
    return min(seconds)


def _accuracy(
    tower: nn.Module, bank: AdapterBank, image: torch.Tensor, mix: Mix, prefix: str
) -> float:
    """Return the RMS error of the fused fp32 tower over that of the bare one, both against fp64."""
    with bank.use([mix]):
        ours = tower(image)[0].double()
    base = tower(image)[0].double()
    exact = copy.deepcopy(tower).double()
    exact_base = exact(image.double())[0]
    for name, (down, up) in mix.pairs().items():
        exact.get_submodule(name.removeprefix(prefix)).weight += up.double() @ down.double()
    return round(_rms(ours, exact(image.double())[0]) / _rms(base, exact_base), 4)


def _rms(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _thousand_mixes() -> bool:
    """Return whether the miniature base is bit-identical after 1,000 images with 1,000 mixes."""
    base = load_base("miniature")
    before = _digest(base.model)
    adapters = [pack(random_adapter(base.model, number, rank=RANK)) for number in range(12)]
    random = numpy_generator(0, "bench", "mixes")
    predictor = Predictor(base)
    side = base.model.config.image_size
    for _ in range(125):
        pictures = list(random.integers(0, 256, (8, side, side, 3), dtype=np.uint8))
        mixes = [
            fuse([adapters[i] for i in random.permutation(12)[:K]], random.dirichlet(np.ones(K)))
            for _ in pictures
        ]
        predictor.predict(pictures, ["road", "sky", "car"], mixes)
    return before == _digest(base.model)


def _crossings() -> dict[str, float]:
    """Return the measured tokens above which merging is faster, with T* in the name."""
    shapes = [(768, 768), (3072, 768), (768, 3072), (128, 128)]
    table = measure_table(shapes, torch.device("cpu"), torch.float32)
    return {f"{o}x{i} (T* {o * i // (o + i)})": t for (o, i), t in table.measured.items()}


def _weights(index: int) -> list[float]:
    return [float(w) for w in numpy_generator(index, "bench", "weights").dirichlet(np.ones(K))]


def _noise(key: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(0, "bench", key))


def _digest(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else b"")
    return total.hexdigest()
