"""Sampling with the sizes of Stable Diffusion 1.4 on an accelerator.

``python -m tests.bench.sampler_device`` prints one JSON object as its last line, and each figure on
stderr when it is measured. Random weights, 512 x 512 pixels, given text encodings; it needs only
torch, diffusers and their dependencies. Variants that exceed the time limit are in ``skipped``.
``--device cpu --tiny`` runs everything in a minute.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from loraseg.backbones.diffusion import DiffusionBase, TextEncoding, get_alphas_cumprod
from loraseg.compat import prepare_torchvision
from loraseg.synth.region_attention import RegionControl
from loraseg.synth.regions import Regions
from loraseg.synth.sampling import SamplingBatch, SamplingConfig, denoise
from loraseg.synth.schedulers import SchedulerSteps

# Operations per image: 50 steps with two UNet passes, decoding and text encoding.
UNET_TFLOP, DECODE_TFLOP = 0.803, 2.52
PEAK_TFLOPS = 790.0
TOKENS, SLICE = 77, 8
REPEATS, WARM_UP_STEPS = 2, 4


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    prepare_torchvision()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with torch.no_grad():
        bench = _Bench(options)
        bench.run()
    sys.stdout.write(json.dumps(bench.result()) + "\n")
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small UNet, for a CPU")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="ddim", help="default: ddim, one call a step")
    parser.add_argument("--batches", default="1,2,4,8,16,32", help="images per call of the UNet")
    parser.add_argument("--main-batch", type=int, default=8, help="batch of the other variants")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--budget-s", type=float, default=270.0, help="limit for starting variants")
    return parser.parse_args(arguments)


@dataclasses.dataclass
class _Measurement:
    """Seconds of one variant for one batch from noise to pixels."""

    name: str
    batch: int
    seconds: float
    first_s: float
    memory_gb: float

    def to_json(self, tflop_per_image: float) -> dict[str, object]:
        rate = self.batch / self.seconds
        return {
            "batch": self.batch,
            "seconds": round(self.seconds, 4),
            "images_per_s": round(rate, 3),
            "share_of_peak": round(rate * tflop_per_image / PEAK_TFLOPS, 4),
            "first_run_s": round(self.first_s, 1),
            "memory_gb": round(self.memory_gb, 2),
        }


class _Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._started = time.perf_counter()
        self._device = torch.device(options.device)
        self._dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        self._base = _base(self._device, self._dtype, tiny=options.tiny)
        self._control = RegionControl(self._base.unet)
        cross = _cross_attention_names(self._base.unet)
        self._shares = RegionControl(self._base.unet, alpha_modules=cross)
        self._pipeline = _stock(self._base)
        self._config = SamplingConfig(
            steps=options.steps,
            scheduler=options.scheduler,
            precision=options.dtype,
            decode_slice=SLICE,
        )
        self._figures: dict[str, dict[str, object]] = {}
        self._seconds: dict[str, float] = {}
        self._skipped: dict[str, str] = {}
        self._quality: dict[str, object] = {}

    def run(self) -> None:
        main = self._options.main_batch
        self._compare(min(main, 4))
        self._measure("stock", main, self._stock_run)
        self._measure("ours", main, self._run_ours)
        self._measure("regions", main, self._run_regions)
        self._measure("shares", main, self._run_shares)
        for batch in sorted({int(one) for one in self._options.batches.split(",")} - {main}):
            self._measure("ours", batch, self._run_ours)
            if batch < main:
                self._measure("stock", batch, self._stock_run)
        self._base.unet.to(memory_format=torch.channels_last)
        self._base.vae.to(memory_format=torch.channels_last)
        self._measure("ours_channels_last", main, self._run_ours)
        if not self._options.no_compile:
            self._base.unet.compile()
            self._measure("ours_compiled", main, self._run_ours)
            self._measure("regions_compiled", main, self._run_regions)
            self._measure("stock_compiled", main, self._stock_run)

    def result(self) -> dict[str, object]:
        main = self._options.main_batch
        names = {
            "ours_vs_stock": (f"ours_b{main}", f"stock_b{main}"),
            "regions_on_vs_off": (f"regions_b{main}", f"ours_b{main}"),
            "shares_on_vs_off": (f"shares_b{main}", f"ours_b{main}"),
            "channels_last_vs_not": (f"ours_channels_last_b{main}", f"ours_b{main}"),
            "compiled_vs_not": (f"ours_compiled_b{main}", f"ours_channels_last_b{main}"),
            "compiled_vs_stock": (f"ours_compiled_b{main}", f"stock_b{main}"),
        }
        return {
            "bench": "sampler_device",
            "ratios": {
                name: round(self._seconds[one] / self._seconds[other], 4)
                for name, (one, other) in names.items()
                if one in self._seconds and other in self._seconds
            },
            "figures": self._figures,
            "quality": self._quality,
            "skipped": self._skipped,
            "setting": {
                "device": _device_name(self._device),
                "torch": torch.__version__,
                "dtype": str(self._dtype),
                "steps": self._options.steps,
                "scheduler": self._options.scheduler,
                "tiny": self._options.tiny,
                "parameters": sum(p.numel() for p in self._base.unet.parameters()),
                "tflop_per_image": self._tflop(),
                "peak_tflops": PEAK_TFLOPS,
                "matmul_tflops_here": _matmul_tflops(self._device, self._dtype),
                "seconds_in_all": round(time.perf_counter() - self._started, 1),
            },
        }

    def _tflop(self) -> float:
        return round(self._options.steps * 2 * UNET_TFLOP + DECODE_TFLOP, 2)

    def _measure(self, what: str, batch: int, run: Callable[[int, int], object]) -> None:
        """Run a few warm-up steps, then take the faster of two runs."""
        name = f"{what}_b{batch}"
        used = time.perf_counter() - self._started
        if used > self._options.budget_s:
            self._skipped[name] = f"{used:.0f} s of the time limit were used"
            return
        try:
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            first = self._timed(lambda: run(batch, min(WARM_UP_STEPS, self._options.steps)))
            seconds = min(
                self._timed(lambda: run(batch, self._options.steps)) for _ in range(REPEATS)
            )
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self._skipped[name] = f"{type(error).__name__}: {str(error)[:200]}"
            return
        cuda = self._device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
        figure = _Measurement(name, batch, seconds, first, memory)
        self._seconds[name] = seconds
        self._figures[name] = figure.to_json(self._tflop())
        sys.stderr.write(f"{name}: {json.dumps(self._figures[name])}\n")

    def _timed(self, run: Callable[[], object]) -> float:
        _synchronize(self._device)
        started = time.perf_counter()
        run()
        _synchronize(self._device)
        return time.perf_counter() - started

    def _inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return noise, one conditional and the unconditional text encoding."""
        random = torch.Generator().manual_seed(0)
        side = self._base.unet.config.sample_size
        noise = torch.randn(batch, 4, side, side, generator=random)
        width = self._base.unet.config.cross_attention_dim
        text = torch.randn(2, TOKENS, width, generator=random).to(self._device, self._dtype)
        return noise, text[:1], text[1:]

    def _latents(
        self, batch: int, steps: int, control: RegionControl, *, regions: bool = False
    ) -> torch.Tensor:
        noise, text, empty = self._inputs(batch)
        wish = SamplingBatch(
            noise=noise,
            text=TextEncoding(text),
            prompts=(0,) * batch,
            unconditional=TextEncoding(empty),
            generators=[torch.Generator().manual_seed(k) for k in range(batch)],
            regions=self._regions(batch) if regions else None,
        )
        config = dataclasses.replace(self._config, steps=steps)
        return denoise(self._base, control, wish, config)

    def _run_ours(self, batch: int, steps: int) -> np.ndarray:
        return self._pixels(self._latents(batch, steps, self._control))

    def _run_regions(self, batch: int, steps: int) -> np.ndarray:
        return self._pixels(self._latents(batch, steps, self._control, regions=True))

    def _run_shares(self, batch: int, steps: int) -> np.ndarray:
        return self._pixels(self._latents(batch, steps, self._shares, regions=True))

    def _pixels(self, latents: torch.Tensor) -> np.ndarray:
        return self._base.decode_latents(latents, slice_size=SLICE).cpu().numpy()

    def _stock_run(self, batch: int, steps: int) -> np.ndarray:
        return (self._stock_images(batch, steps, "np") * 255).round().astype(np.uint8)

    def _stock_images(self, batch: int, steps: int, output: str) -> np.ndarray | torch.Tensor:
        noise, text, empty = self._inputs(batch)
        # The same scheduler as in loraseg, so that only the loops differ.
        self._pipeline.scheduler = SchedulerSteps(
            self._base.scheduler, self._options.scheduler, steps, torch.device("cpu")
        )._scheduler
        return self._pipeline(
            prompt_embeds=text.repeat(batch, 1, 1),
            negative_prompt_embeds=empty.repeat(batch, 1, 1),
            latents=noise.to(self._device, self._dtype),
            num_inference_steps=steps,
            guidance_scale=self._config.guidance,
            output_type=output,
        ).images

    def _compare(self, batch: int) -> None:
        """Compare pixels with those of the stock pipeline for equal noise."""
        steps = self._options.steps
        ours = self._latents(batch, steps, self._control)
        stock = self._stock_images(batch, steps, "latent")
        scale = self._base.vae.config.scaling_factor
        first, second = (
            self._base.vae.decode((one / scale).to(self._dtype)).sample.float().clamp(-1, 1)
            for one in (ours, stock)
        )
        error = float((first - second).double().square().mean())
        self._quality = {
            "psnr_vs_stock_db": round(10 * math.log10(4 / max(error, 1e-20)), 1),
            "largest_latent_difference": float((ours - stock).abs().max()),
            "latent_deviation": float(ours.float().std()),
        }
        sys.stderr.write(f"{json.dumps(self._quality)}\n")

    def _regions(self, batch: int) -> Regions:
        side = self._base.unet.config.sample_size * self._base.latent_factor
        columns = torch.arange(side) * 6 // side
        labels = columns.expand(batch, side, side).to(torch.uint8)
        tokens = torch.full((batch, TOKENS), -1)
        tokens[:, 1:7] = torch.arange(6)
        return Regions(labels.to(self._device), tokens.to(self._device))


def _base(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> DiffusionBase:
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    small = {"block_out_channels": (32, 64), "norm_num_groups": 8}
    unet = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    vae = {"block_out_channels": (128, 256, 512, 512)}
    if tiny:
        unet |= {
            **small,
            "sample_size": 16,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        vae = small
    levels = len(vae["block_out_channels"])
    with device:  # a CPU is slow for a billion random values
        parts = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(
                **vae,
                layers_per_block=2,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
            ),
        }
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    base = DiffusionBase(
        name="sd1.4 shape",
        digest="0" * 64,
        kind="sd",
        tokenizers=(),
        text_encoders=(),
        scheduler=scheduler,
        alphas_cumprod=get_alphas_cumprod(scheduler),
        **parts,
    )
    return base.to(device, dtype)


def _stock(base: DiffusionBase) -> object:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        unet=base.unet,
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _cross_attention_names(unet: torch.nn.Module) -> list[str]:
    return [n for n, m in unet.named_modules() if getattr(m, "is_cross_attention", False)]


def _matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    side = 8192 if device.type == "cuda" else 512
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        one @ other
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(10):
        one @ other
    _synchronize(device)
    return round(10 * 2 * side**3 / (time.perf_counter() - started) / 1e12, 2)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
