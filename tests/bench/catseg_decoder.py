"""CAT-Seg's aggregator and decoder against the official formulation, ViT-B/16 sizes, one crop."""

import torch
from torch import Tensor

from loraseg.seeding import torch_generator
from loraseg.segment.open_vocabulary.catseg import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.aggregator import Aggregator
from tests.bench.harness import Times, interleave, ratio, setting, single_thread
from tests.bench.plain_catseg import plain_aggregator

CLASSES, ROUNDS, BFLOAT16_CLASSES = (19, 59, 150), 3, 59
_Inputs = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]


@single_thread()
def run() -> dict[str, object]:
    module, inputs = _module(), {classes: _inputs(classes) for classes in CLASSES}
    times: Times = {}
    errors: dict[int, float] = {}
    for classes in CLASSES:
        times |= _time(module, inputs[classes], str(classes))
        errors[classes] = _difference(module, inputs[classes])
    half = _to_bfloat16(inputs[BFLOAT16_CLASSES])
    module.to(torch.bfloat16)
    times |= _time(module, half, f"{BFLOAT16_CLASSES}_bf16")
    names = [f"c{classes}" for classes in CLASSES]
    return {
        "bench": "catseg_decoder",
        "ratios": {f"speedup_{n}": round(1 / ratio(times, n, f"plain_{n}"), 2) for n in names},
        "checks": {"exact_1e5": max(errors.values()) <= 1e-5},
        "setting": setting(
            times,
            exact="largest difference over largest logit, float32",
            differences={f"c{classes}": error for classes, error in errors.items()},
            crops=1,
            image_size=CATSegConfig().image_size,
            speedup_bf16_c59=round(1 / ratio(times, "c59_bf16", "plain_c59_bf16"), 2),
        ),
    }


def _module() -> Aggregator:
    module = Aggregator(CATSegConfig()).eval().requires_grad_(requires_grad=False)
    generator = torch_generator(0, "bench", "catseg_decoder", "weights")
    for parameter in module.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        near = 1.0 if parameter.dim() == 1 else 0.0
        parameter.copy_(near + spread * torch.randn(parameter.shape, generator=generator))
    return module


def _inputs(classes: int) -> _Inputs:
    config = CATSegConfig()
    generator = torch_generator(0, "bench", "catseg_decoder", classes)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    grid, (first, second) = config.grid, config.guidance_dims
    return (
        draw(1, config.embed_dim, grid, grid),
        draw(1, classes, 1, config.embed_dim),
        (draw(1, first, 2 * grid, 2 * grid), draw(1, second, 4 * grid, 4 * grid)),
    )


@torch.inference_mode()
def _time(module: Aggregator, inputs: _Inputs, name: str) -> Times:
    rivals = {
        f"c{name}": lambda: module(*inputs),
        f"plain_c{name}": lambda: plain_aggregator(module, *inputs),
    }
    return interleave(rivals, rounds=ROUNDS)


@torch.inference_mode()
def _difference(module: Aggregator, inputs: _Inputs) -> float:
    ours, plain = module(*inputs), plain_aggregator(module, *inputs)
    return float((ours - plain).abs().max() / plain.abs().max())


def _to_bfloat16(inputs: _Inputs) -> _Inputs:
    features, text, (first, second) = inputs
    half = torch.bfloat16
    return features.to(half), text.to(half), (first.to(half), second.to(half))
