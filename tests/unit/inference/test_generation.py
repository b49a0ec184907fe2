"""A generator loaded by names equals one that is put together by hand."""

import numpy as np
import pytest

from loraseg.adapters.packed import pack
from loraseg.adapters.peft_io import load_adapter, to_peft_files
from loraseg.backbones.diffusion import load_diffusion
from loraseg.errors import ConfigError
from loraseg.inference.generation import load_generator
from loraseg.library import AdapterCard, BaseModelInfo, Library
from loraseg.synth.conditioning import Conditioner, ConditioningConfig
from loraseg.synth.generator import Generator
from loraseg.synth.generator_adapter import GeneratorAdapter
from loraseg.synth.sampling import SamplingConfig
from tests.unit.synth.tiny_generator import (  # noqa: F401
    SPACE,
    block_mask,
    one_thread,
    random_adapter,
    tiny_pipeline,
)

SAMPLING = SamplingConfig(images=2, steps=2)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline("sd").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter_spec(base_folder, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("library"))
    digest = load_diffusion(base_folder).digest
    files = to_peft_files(random_adapter("x", base_digest=None).pairs, base_digest=digest)
    base = BaseModelInfo("tiny", digest)
    card = AdapterCard(name="rain", role="generator", base=base, label_space=SPACE.names)
    Library.open(uri).publish("rain", files, card)
    return f"{uri}#rain"


def test_images_equal_those_of_the_parts(base_folder, adapter_spec):
    loaded = load_generator(base_folder, [adapter_spec], weights=[0.5], sampling=SAMPLING)
    assert loaded.label_space == SPACE
    images = loaded.generate(block_mask(1), prompt_template="{classes} in fog")
    base = load_diffusion(base_folder)
    uri, _, name = adapter_spec.partition("#")
    adapter = load_adapter(Library.open(uri).load(name)[0], name=name)
    generator = Generator(
        base,
        Conditioner(base.tokenizers, SPACE, ConditioningConfig(template="{classes} in fog")),
        adapters=[GeneratorAdapter(adapter=pack(adapter), weight=0.5)],
        config=SAMPLING,
    )
    expected = list(generator.generate([("mask", block_mask(1))]))
    assert len(images) == len(expected) == 2
    for image, other in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image.image, other.image)
        np.testing.assert_array_equal(image.label, other.label)
        assert image.lineage.prompt == other.lineage.prompt


def test_class_names_are_needed_without_an_adapter_that_lists_them(base_folder):
    loaded = load_generator(base_folder, sampling=SAMPLING)
    assert loaded.label_space is None
    with pytest.raises(ConfigError, match="classes: expected the class names"):
        loaded.generate(block_mask(0))
    assert len(loaded.generate(block_mask(0), SPACE.names)) == 2


def test_one_weight_per_adapter(base_folder):
    with pytest.raises(ConfigError, match="weights: got 1, expected one per adapter: 0"):
        load_generator(base_folder, weights=[1.0])
