"""Loading of bases, and their text encoding."""

import dataclasses
import hashlib
import json

import pytest
import torch

from loraseg.backbones.bpe import BpeTokenizer
from loraseg.backbones.tokenizer import WordTokenizer
from loraseg.errors import ConfigError, IntegrityError
from loraseg.segment.open_vocabulary.base import load_base, save_base
from loraseg.segment.open_vocabulary.catseg.checkpoint import read_metadata, save_catseg
from loraseg.segment.open_vocabulary.catseg.official import load_official_checkpoint
from tests.unit.segment.open_vocabulary.catseg.official_layout import Sizes, random_state

WORDS = WordTokenizer(["road", "sky"], context_length=9, buckets=15)
SMALL = {"vision_heads": 2, "text_heads": 2, "heads": 2}


def write_base(path, **header):
    model = load_official_checkpoint(random_state(Sizes(vocabulary=WORDS.vocab_size)), **SMALL)
    save_catseg(model.float(), path, header)
    return path


def test_file_with_its_config(tmp_path):
    path = write_base(
        tmp_path / "m.safetensors",
        vocabulary=json.dumps(WORDS.vocabulary),
        prompt="here is {}",
        mean="[0.5, 0.5, 0.5]",
        std="[0.25, 0.25, 0.25]",
    )
    base = load_base(str(path))
    assert base.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (base.mean, base.std) == ((127.5,) * 3, (63.75,) * 3)
    assert (base.window, base.pad_multiple) == (16, 1)
    assert not base.model.training
    ids = base.tokenize(["road, street", "sky"])
    assert torch.equal(ids[:, 0], WORDS(["here is road", "here is sky"]))
    features = base.encode_classes(["road", "sky"])
    torch.testing.assert_close(features[:, 0], base.model.encode_text(ids[:, 0]))
    features.sum().backward()
    assert base.model.clip.text_projection.grad.abs().max() > 0
    black = base.normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert torch.equal(black, torch.full((1, 3, 2, 2), -2.0))


def test_official_file(tmp_path):
    state = {key: value.float() for key, value in random_state(Sizes()).items()}
    torch.save({"model": state}, tmp_path / "m.pth")
    base = load_base(str(tmp_path / "m.pth"), clip_attention_lora="inert", **SMALL)
    assert base.prompt == "A photo of a {} in the scene"
    assert (base.window, base.pad_multiple) == (384, 32)
    assert base.mean == (122.7709383, 116.7460125, 104.09373615)
    assert isinstance(base.tokenizer, BpeTokenizer)
    assert base.model.config.clip_attention_lora == "inert"
    assert base.tokenizer.context_length == 9


def test_invalid_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_base(str(tmp_path / "none.pth"))
    (tmp_path / "m.pth").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="cannot be read as a checkpoint"):
        load_base(str(tmp_path / "m.pth"))
    path = write_base(tmp_path / "m.safetensors", mean="[1, 2]")
    with pytest.raises(IntegrityError, match="does not describe a base: not enough values"):
        load_base(str(path))
    path = write_base(tmp_path / "m.safetensors", prompt="no slot")
    with pytest.raises(IntegrityError, match="does not describe a base: prompt: got"):
        load_base(str(path))


def test_a_finetuned_base_can_be_saved_and_loaded(tmp_path):
    first = write_base(
        tmp_path / "first.safetensors",
        vocabulary=json.dumps(WORDS.vocabulary),
        mean="[0.1, 0.2, 0.3]",
    )
    base = dataclasses.replace(load_base(str(first)), window=24, pad_multiple=4, prompt="see {}")
    with torch.no_grad():
        base.model.upsample1.bias.add_(1)
    save_base(base, tmp_path / "second.safetensors", {"training": "one step"})
    assert read_metadata(tmp_path / "second.safetensors")["training"] == "one step"
    again = load_base(str(tmp_path / "second.safetensors"))
    assert again.digest != base.digest
    assert (again.window, again.pad_multiple, again.prompt) == (24, 4, "see {}")
    assert again.mean == pytest.approx(base.mean, rel=1e-15)
    assert torch.equal(again.tokenize(["sky", "sea"]), base.tokenize(["sky", "sea"]))
    assert torch.equal(again.model.upsample1.bias, base.model.upsample1.bias)
