"""Generator adapters from folders and libraries, and those that are refused."""

import pytest
import torch

from loraseg.adapters.attention_mix import encode_attention_mix
from loraseg.adapters.peft_io import ATTENTION_MIX_FILE, files_digest, to_peft_files
from loraseg.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, IntegrityError
from loraseg.inference.generator_adapters import ACTIVE_ADAPTERS_KEY, load_generator_adapter
from loraseg.library import AdapterCard, BaseModelInfo, Library
from loraseg.storage import open_store
from tests.unit.synth.tiny_generator import DIGEST, random_adapter, tiny_base

OWNER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
FUSION = {f"{OWNER}.alpha.weight": torch.ones(1, 8), f"{OWNER}.alpha.bias": torch.zeros(1)}


def files(base_digest=DIGEST, *, fused=True):
    made = to_peft_files(random_adapter("x").pairs, base_digest=base_digest)
    return {**made, ATTENTION_MIX_FILE: encode_attention_mix(FUSION, "pooled")} if fused else made


def card(**more):
    return AdapterCard(
        **{"name": "rain", "role": "generator", "base": BaseModelInfo("tiny", DIGEST), **more}
    )


def write(folder, contents):
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_a_folder_with_card_and_attention_mix(tmp_path):
    active = card(recipe={ACTIVE_ADAPTERS_KEY: ["ef" * 32]})
    place = write(tmp_path / "a", {**files(), "card.json": active.to_bytes()})
    loaded = load_generator_adapter(place, tiny_base(), weight=0.5)
    assert loaded.card == active
    got = loaded.adapter
    assert (got.adapter.name, got.weight) == ("rain", 0.5)
    assert got.adapter.digest == files_digest(files())
    assert got.trained_with == ("ef" * 32,)
    assert got.attention_mix.mode == "pooled"
    assert got.attention_mix.tensors.keys() == FUSION.keys()


def test_a_folder_with_only_peft_files(tmp_path):
    loaded = load_generator_adapter(write(tmp_path / "b", files(None, fused=False)), tiny_base())
    assert loaded.card is None
    assert loaded.adapter.attention_mix is None
    assert loaded.adapter.trained_with is None
    assert loaded.adapter.adapter.name == "b"


def test_a_library(tmp_path):
    uri = str(tmp_path / "library")
    library = Library(open_store(uri))
    library.publish("rain", files(), card(recipe={ACTIVE_ADAPTERS_KEY: []}))
    library.publish("rain", files(fused=False), card())
    assert load_generator_adapter(f"{uri}#rain", tiny_base()).adapter.attention_mix is None
    first = load_generator_adapter(f"{uri}#rain@1", tiny_base())
    assert first.adapter.attention_mix is not None
    assert first.adapter.trained_with == ()
    with pytest.raises(AdapterNotFoundError):
        load_generator_adapter(f"{uri}#snow", tiny_base())
    with pytest.raises(AdapterNotFoundError):
        load_generator_adapter(f"{uri}#rain@7", tiny_base())


@pytest.mark.parametrize("spec", ["nowhere", "lib#", "#name", "lib#name@", "lib#name@-1"])
def test_invalid_specs_are_refused(spec):
    with pytest.raises(ConfigError, match=r"no such folder|expected a number"):
        load_generator_adapter(spec, tiny_base())


def test_adapters_of_other_roles_and_bases_are_refused(tmp_path):
    other = "cd" * 32
    cases = {
        "config": (files(other), AdapterMismatchError, "trained on base cdcdcdcdcdcd"),
        "card": (
            {**files(None), "card.json": card(base=BaseModelInfo("t", other)).to_bytes()},
            AdapterMismatchError,
            "trained on base cdcdcdcdcdcd",
        ),
        "role": (
            {**files(), "card.json": card(role="segmenter").to_bytes()},
            AdapterMismatchError,
            "its role is segmenter",
        ),
        "broken": (
            {**files(), ATTENTION_MIX_FILE: b"nothing"},
            IntegrityError,
            "fusion.safetensors",
        ),
        "odd": ({**files(), "card.json": b"{}"}, IntegrityError, "card"),
    }
    for name, (contents, error, message) in cases.items():
        with pytest.raises(error, match=message):
            load_generator_adapter(write(tmp_path / name, contents), tiny_base())
