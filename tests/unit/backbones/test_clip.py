"""The index encoder: preprocessing, embeddings and sources of weights."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from loraseg.backbones.bpe import BpeTokenizer
from loraseg.backbones.clip import ClipEncoder, Preprocessing, load_clip
from loraseg.backbones.tokenizer import WordTokenizer
from loraseg.compat import prepare_torchvision
from loraseg.errors import ConfigError, DatasetError, IntegrityError

WORDS = WordTokenizer(["road", "sky"], context_length=6, buckets=4)
CONFIG = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 8, "layers": 2, "head_width": 4},
    "text_cfg": {"context_length": 6, "vocab_size": 9, "width": 8, "heads": 2, "layers": 1},
    "quick_gelu": True,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
}


@pytest.fixture(scope="module")
def model():
    prepare_torchvision()
    from open_clip.model import CLIP

    torch.manual_seed(0)
    return CLIP(6, CONFIG["vision_cfg"], CONFIG["text_cfg"], quick_gelu=True).eval()


@pytest.fixture
def file(tmp_path, model):
    path = tmp_path / "clip.safetensors"
    header = {"config": json.dumps(CONFIG), "vocabulary": json.dumps(["road", "sky"])}
    tensors = {key: value.half() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata=header)
    return path


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(8, 8, 0, 0), (8, 13, 0, 2), (11, 8, 1, 0)]
)
def test_the_centre_crop_is_exact_without_resizing(height, width, top, left):
    image = picture(height, width)
    got = Preprocessing(8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(image)
    assert got.dtype == np.float32
    for channel, (mean, std) in enumerate(zip((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), strict=True)):
        crop = image[top : top + 8, left : left + 8, channel].astype(np.float64)
        np.testing.assert_allclose(got[channel], (crop / 255 - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(40, 73), (73, 40), (16, 16), (5, 9)])
def test_shortest_edge_is_bicubic_with_smoothing(height, width):
    # Separable cubic kernel with a = -0.5, as wide as the step.
    image = picture(height, width)
    size = 8
    long = int(size * max(height, width) / min(height, width))
    target = (size, long) if height < width else (long, size)
    rows, columns = (kernel(n, m) for n, m in zip(target, (height, width), strict=True))
    across = np.clip(np.round(np.einsum("jw,hwc->hjc", columns, image)), 0, 255)
    both = np.clip(np.round(np.einsum("ih,hjc->ijc", rows, across)), 0, 255)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    expected = both[top : top + size, left : left + size].transpose(2, 0, 1)
    got = Preprocessing(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(image) * 255
    assert np.abs(got - expected).max() < 1.01  # fixed-point rounding of the image library
    assert np.abs(got - expected).mean() < 0.1


def kernel(outputs, inputs):
    scale = inputs / outputs
    stretch = max(scale, 1.0)
    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        for j in range(inputs):
            x = abs((j + 0.5 - (i + 0.5) * scale) / stretch)
            if x < 1:
                matrix[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                matrix[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return matrix / matrix.sum(axis=1, keepdims=True)


def test_embeddings_are_projected_and_not_normalised(model):
    encoder = ClipEncoder(model, WORDS, Preprocessing(8), name="x", digest="0" * 64, batch_size=2)
    images = [picture(8, 8, 1), picture(20, 11, 2), picture(8, 30, 3)]
    got = encoder.encode_images(images)
    assert got.dtype == np.float32
    pixels = torch.from_numpy(np.stack([encoder.preprocessing(image) for image in images]))
    with torch.no_grad():
        expected = model.encode_image(pixels).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    assert np.abs(np.linalg.norm(got, axis=1) - 1).min() > 1e-3
    assert encoder.encode_images([]).shape == (0, 6)
    texts = encoder.encode_texts(["road", "sky"])
    with torch.no_grad():
        np.testing.assert_allclose(texts, model.encode_text(WORDS(["road", "sky"])).numpy())


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((8, 0, 3), np.uint8)]
)
def test_invalid_images_are_refused(model, image):
    encoder = ClipEncoder(model, WORDS, Preprocessing(8), name="x", digest="0" * 64)
    with pytest.raises(DatasetError, match="image 1"):
        encoder.encode_images([picture(8, 8), image])


def test_a_file_with_its_config(file, model):
    encoder = load_clip(str(file))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert encoder.digest == digest
    assert encoder.encoder_id == f"clip:sha256-{digest[:16]}:edge8-bicubic-crop"
    assert encoder.dim == 6
    assert encoder.preprocessing.mean == (0.5, 0.4, 0.3)
    assert torch.equal(encoder.tokenizer(["sky up"]), WORDS(["sky up"]))
    for key, value in model.state_dict().items():
        assert encoder.model.state_dict()[key].dtype == torch.float32
        torch.testing.assert_close(encoder.model.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_invalid_files_are_refused(tmp_path, file):
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(
        {"a": torch.zeros(1)}, path, metadata={"config": json.dumps(CONFIG)}
    )
    with pytest.raises(IntegrityError, match="do not fit"):
        load_clip(str(path))
    odd = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "wings": 2}}
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"config": json.dumps(odd)})
    with pytest.raises(IntegrityError, match=r"invalid CLIP config.*wings"):
        load_clip(str(path))
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(IntegrityError, match="contains no CLIP config"):
        load_clip(str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        load_clip(str(tmp_path / "none.safetensors"))


def test_open_clip_pairs_are_checked_without_the_network():
    with pytest.raises(ConfigError, match=r"near: .*ViT-L-14/openai"):
        load_clip("ViT-L-14/openia")
    with pytest.raises(ConfigError, match=r"no model 'ViT-L-15'; near: .*ViT-L-14"):
        load_clip(f"ViT-L-15={__file__}")


def test_weights_of_a_named_model_must_fit(file):
    with pytest.raises(IntegrityError, match="do not fit open_clip's RN50"):
        load_clip(f"RN50={file}")


def test_byte_pairs_equal_those_of_clip():
    # Ids as in OpenAI's release: "a photo of a cat".
    tokenizer = BpeTokenizer()
    ids = tokenizer(["a photo of a cat", ""])
    assert ids.shape == (2, 77)
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert ids[1, :3].tolist() == [49406, 49407, 0]
    assert tokenizer.vocab_size == 49408
    long = BpeTokenizer(8)(["road " * 50])
    assert long.shape == (1, 8)
    assert int(long[0, -1]) == 49407
