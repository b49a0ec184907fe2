import pytest
import torch

from loraseg.backbones.diffusion import load_diffusion
from loraseg.miniature.models.generator.model import (
    build_codec,
    build_text_encoder,
    build_unet,
    write_pipeline,
)
from loraseg.miniature.models.generator.text import build_tokenizer
from loraseg.miniature.models.weights_io import WEIGHTS

FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


def _bytes(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    models = {"unet": build_unet(), "codec": build_codec(0.7), "text_encoder": build_text_encoder()}
    models["unet"].to(memory_format=torch.channels_last)
    return models


def test_equal_models_give_equal_files_that_can_be_read_back(tmp_path, models):
    write_pipeline(tmp_path / "a", **models)
    write_pipeline(tmp_path / "b", **models)
    first = _bytes(tmp_path / "a")
    assert set(first) == FILES
    assert first == _bytes(tmp_path / "b")
    for path in (tmp_path / "a").glob("*/config.json"):
        assert "_name_or_path" not in path.read_text()
    base = load_diffusion(str(tmp_path / "a"))
    assert base.vae.config.scaling_factor == 0.7
    for name, tensor in models["unet"].state_dict().items():
        assert torch.equal(base.unet.state_dict()[name], tensor.half().float())


def test_the_shipped_folder_is_a_regular_pipeline():
    from diffusers import StableDiffusionPipeline

    files = _bytes(WEIGHTS / "generator")
    assert set(files) == FILES
    assert not [name for name, data in files.items() if b"_name_or_path" in data]
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "generator")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a car", num_inference_steps=2, output_type="np", generator=generator).images
    assert image.shape == (1, 64, 64, 3)
    assert image.std() > 0.02


def test_the_shipped_folder_is_the_base_named_miniature():
    base = load_diffusion("miniature")
    assert (base.kind, base.prediction_type) == ("sd", "v_prediction")
    assert (base.text_length, base.image_size, base.latent_factor) == (32, 64, 2)
    assert sum(value.numel() for value in base.unet.parameters()) < 4.4e6
    cross_attention = [m for m in base.unet.modules() if getattr(m, "is_cross_attention", False)]
    assert len(cross_attention) == 16


def test_a_word_has_the_same_distinct_vector_in_every_prompt():
    encoder, tokenizer = build_text_encoder(), build_tokenizer()
    ids = tokenizer(["car road", "road a car"], padding="max_length", return_tensors="pt").input_ids
    first, second = encoder(input_ids=ids).last_hidden_state
    assert torch.equal(first[1], second[3])
    assert torch.equal(first[2], second[1])
    assert torch.equal(first[-1], first[3])  # padding is independent of the prompt
    words = ["car", "bus", "road", "sky", "person", "pole", "sign", "tree", "building", "grass"]
    ids = torch.tensor([tokenizer(word).input_ids[1] for word in words])
    vectors = encoder(input_ids=ids[None]).last_hidden_state[0]
    cosines = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    assert (cosines - torch.eye(len(words))).abs().max() < 0.4
    assert torch.allclose(vectors.norm(dim=-1), torch.tensor(96**0.5), rtol=1e-2)
