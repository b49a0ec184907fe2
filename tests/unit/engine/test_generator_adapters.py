"""Generator adapters from disk: what lies beside peft's files, and what is refused."""

import pytest
import torch

from loraseg.adapters.fusion_file import FUSION_FILE, fusion_file
from loraseg.adapters.peft_io import adapter_files, files_digest
from loraseg.engine.generator_adapters import ACTIVE_KEY, load_generator_adapter
from loraseg.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, IntegrityError
from loraseg.library import BaseModel, Card, Library
from loraseg.storage import open_store
from tests.unit.synth.generating import DIGEST, adapter, base

OWNER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
FUSION = {f"{OWNER}.alpha.weight": torch.ones(1, 8), f"{OWNER}.alpha.bias": torch.zeros(1)}


def files(base_digest=DIGEST, *, fused=True):
    made = adapter_files(adapter("x").pairs, base_digest=base_digest)
    return {**made, FUSION_FILE: fusion_file(FUSION, "pooled")} if fused else made


def card(**more):
    return Card(**{"name": "rain", "role": "generator", "base": BaseModel("tiny", DIGEST), **more})


def write(folder, contents):
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_a_folder_with_all_that_goes_with_it(tmp_path):
    active = card(recipe={ACTIVE_KEY: ["ef" * 32]})
    place = write(tmp_path / "a", {**files(), "card.json": active.to_bytes()})
    loaded = load_generator_adapter(place, base(), weight=0.5)
    assert loaded.card == active
    got = loaded.adapter
    assert (got.adapter.name, got.weight) == ("rain", 0.5)
    assert got.adapter.digest == files_digest(files())
    assert got.trained_with == ("ef" * 32,)
    assert got.fusion.mode == "pooled"
    assert got.fusion.tensors.keys() == FUSION.keys()


def test_a_bare_folder(tmp_path):
    loaded = load_generator_adapter(write(tmp_path / "b", files(None, fused=False)), base())
    assert loaded.card is None
    assert loaded.adapter.fusion is None
    assert loaded.adapter.trained_with is None
    assert loaded.adapter.adapter.name == "b"


def test_a_library(tmp_path):
    uri = str(tmp_path / "library")
    library = Library(open_store(uri))
    library.publish("rain", files(), card(recipe={ACTIVE_KEY: []}))
    library.publish("rain", files(fused=False), card())
    assert load_generator_adapter(f"{uri}#rain", base()).adapter.fusion is None
    first = load_generator_adapter(f"{uri}#rain@1", base())
    assert first.adapter.fusion is not None
    assert first.adapter.trained_with == ()
    with pytest.raises(AdapterNotFoundError):
        load_generator_adapter(f"{uri}#snow", base())
    with pytest.raises(AdapterNotFoundError):
        load_generator_adapter(f"{uri}#rain@7", base())


@pytest.mark.parametrize("spec", ["nowhere", "lib#", "#name", "lib#name@", "lib#name@-1"])
def test_specs_that_are_none(spec):
    with pytest.raises(ConfigError, match=r"no such folder|expected a number"):
        load_generator_adapter(spec, base())


def test_others_are_refused(tmp_path):
    other = "cd" * 32
    cases = {
        "config": (files(other), AdapterMismatchError, "trained on base cdcdcdcdcdcd"),
        "card": (
            {**files(None), "card.json": card(base=BaseModel("t", other)).to_bytes()},
            AdapterMismatchError,
            "trained on base cdcdcdcdcdcd",
        ),
        "role": (
            {**files(), "card.json": card(role="segmenter").to_bytes()},
            AdapterMismatchError,
            "its role is segmenter",
        ),
        "broken": ({**files(), FUSION_FILE: b"nothing"}, IntegrityError, "fusion.safetensors"),
        "odd": ({**files(), "card.json": b"{}"}, IntegrityError, "card"),
    }
    for name, (contents, error, message) in cases.items():
        with pytest.raises(error, match=message):
            load_generator_adapter(write(tmp_path / name, contents), base())
