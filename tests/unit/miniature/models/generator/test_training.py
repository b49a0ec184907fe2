import numpy as np
import pytest
import torch

from loraseg.backbones.diffusion import load_diffusion
from loraseg.miniature.models.generator import scenes as generator_scenes
from loraseg.miniature.models.generator.model import NOISE_SCHEDULE, build_unet
from loraseg.miniature.models.generator.scenes import draw_scenes
from loraseg.miniature.models.generator.training import (
    GeneratorTrainingConfig,
    _BatchSampler,
    train_codec,
    train_judge,
    train_text_to_image,
)
from loraseg.miniature.pretrain import make_generator, make_judge
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.domains import DOMAINS
from loraseg.segment.closed_set.checkpoint import load_closed_set_segmenter

TINY = GeneratorTrainingConfig(scenes=2, codec_steps=1, judge_steps=2, steps=2, batch=2)


@pytest.fixture(autouse=True)
def _two_domains(monkeypatch):
    two = {name: DOMAINS[name] for name in ("clear-day", "topdown")}
    monkeypatch.setattr(generator_scenes, "DOMAINS", two)


@pytest.fixture
def scenes():
    return draw_scenes(TINY.scenes, 0)


def test_scenes_do_not_depend_on_the_number_of_processes(scenes, monkeypatch):
    assert scenes.domains.tolist() == [0, 0, 1, 1]
    assert not np.array_equal(draw_scenes(TINY.scenes, 1).images, scenes.images)
    # One domain only, since each process imports torch.
    monkeypatch.setattr(generator_scenes, "DOMAINS", {"topdown": DOMAINS["topdown"]})
    other = draw_scenes(TINY.scenes, 0, processes=2)
    for name in ("images", "masks", "captions"):
        assert np.array_equal(getattr(scenes, name)[2:], getattr(other, name)), name


def test_a_codec_gives_latents_of_unit_deviation(scenes):
    codec = train_codec(TINY, scenes)
    with torch.inference_mode():
        pixels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2) / 127.5 - 1
        latents = codec.encode(pixels).latent_dist.mode() * codec.config.scaling_factor
    assert latents.shape == (4, 4, 32, 32)
    assert latents.std() == pytest.approx(1, abs=0.1)  # measured on images drawn with replacement


def test_a_judge_can_be_read_back(tmp_path, scenes):
    make_judge(TINY, tmp_path)
    read = load_closed_set_segmenter(tmp_path / "judge.safetensors")
    assert read.label_space.names == tuple(CLASSES)
    again = train_judge(TINY, scenes).half().float()
    for name, tensor in again.state_dict().items():
        assert torch.allclose(read.network.state_dict()[name], tensor, atol=1e-3), name


def test_training_continues_from_a_given_unet(scenes):
    codec = load_diffusion("miniature").vae
    start = build_unet()
    before = {k: v.clone() for k, v in start.state_dict().items()}
    checkpoints = []
    trained = train_text_to_image(
        TINY, codec, scenes, lambda unet, step: checkpoints.append(step), every=1, init=start
    )
    assert checkpoints == [1, 2]
    assert all(torch.equal(before[k], v) for k, v in start.state_dict().items())
    pairs = list(zip(start.parameters(), trained.parameters(), strict=True))
    assert all(torch.allclose(a, b, atol=0.02) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_batches_hold_the_velocities_of_their_noisy_latents():
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    latents = torch.randn(2, 3, 4, 8, 8).half()
    draw = _BatchSampler(latents, torch.arange(3 * 6 * 32).reshape(3, 6, 32))
    batch = draw(40)
    alphas = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod[batch.times][:, None, None, None]
    clean = alphas.sqrt() * batch.noisy - (1 - alphas).sqrt() * batch.target
    originals = latents.float().flatten(0, 1)
    distance = (clean[:, None] - originals).abs().amax((2, 3, 4))
    assert distance.amin(1).max() < 1e-4
    row = distance.argmin(1) % 3
    empty = batch.ids[:, 1] == batch.ids[:, 2]
    assert 0 < empty.sum() < 20
    # min(SNR + 1, 5) times the error in x0, expressed as an error in v.
    alphas = alphas[:, 0, 0, 0]
    ratio = alphas / (1 - alphas)
    error = torch.randn_like(batch.target)
    in_x0 = (1 - alphas).sqrt()[:, None, None, None] * error
    expected = (ratio + 1).clamp(max=5) * in_x0.square().mean((1, 2, 3))
    assert torch.allclose(batch.weights * error.square().mean((1, 2, 3)), expected, rtol=1e-4)
    assert torch.equal((batch.ids[:, 0] // (6 * 32))[~empty], row[~empty])


def test_a_continued_generator_keeps_its_codec(tmp_path):
    make_generator(TINY, tmp_path / "one")
    first = load_diffusion(str(tmp_path / "one" / "generator"))
    make_generator(TINY, tmp_path / "two", init=tmp_path / "one" / "generator")
    second = load_diffusion(str(tmp_path / "two" / "generator"))
    states = first.vae.state_dict(), second.vae.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert first.vae.config.scaling_factor == second.vae.config.scaling_factor
    assert first.digest != second.digest
