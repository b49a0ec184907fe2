"""Another network behind the protocol: trained, published as files, fused and segmented with."""

import numpy as np
import pytest
import torch
from torch import nn

from loraseg.adapters import load_adapter, to_peft_files
from loraseg.data import IGNORE, open_dataset
from loraseg.fuse import fuse
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.protocol import OpenVocabularyBase
from loraseg.train.segmenter_adapters.recipes import named_recipe
from loraseg.train.segmenter_adapters.samples import TrainingImages
from loraseg.train.segmenter_adapters.training import (
    GroupMember,
    count_parameters,
    train_group,
    train_lora,
)
from tests.tiny_training import LABELS, write_domain
from tests.unit.tiny import tiny_base
from tests.unit.train.tiny_files import RECIPE


class PixelBase:
    """Scores a pixel's colour against an embedding of the class name, by cross-entropy."""

    name, digest, prompts, clip_attention_lora = "pixels", "ef" * 32, ("{}",), "active"
    device, dtype = torch.device("cpu"), torch.float32
    input_size = window = 16
    pad_multiple = 1

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = {
                "pixels": nn.Linear(3, 4),
                "words": nn.Linear(8, 4),
                "scores": nn.Linear(4, 4),
            }
            self.model = nn.ModuleDict(layers).requires_grad_(False).eval()

    def linears(self):
        return dict(self.model.items())

    def target_modules(self, rule="semla"):
        return ("scores",) if rule == "aggregator" else ("pixels", "words", "scores")

    def adapts_images(self, modules):
        return "pixels" in modules

    def adapts_text(self, modules):
        return "words" in modules

    def normalise(self, images):
        return images / 255

    def tokenize(self, classes):
        return torch.tensor([[[len(name) % 8]] for name in classes])

    def encode_tokens(self, ids, *, groups=None):
        codes = nn.functional.one_hot(ids[..., 0], 8).float()
        spread = codes if groups is None else codes.expand(groups, *codes.shape)
        return self.model["words"](spread)

    def encode_images(self, images):
        return self.model["pixels"](images.permute(0, 2, 3, 1))

    def decode(self, features, text):
        return torch.einsum("bhwd,btpd->bthw", self.model["scores"](features), text)

    def forward(self, images, text):
        bank = text.expand(len(images), *text.shape) if text.dim() == 3 else text
        return self.decode(self.encode_images(images), bank)

    def loss(self, logits, labels, *, mask_ignored=False):
        resized = nn.functional.interpolate(logits, labels.shape[-2:])
        return nn.functional.cross_entropy(resized, labels.long(), ignore_index=IGNORE)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    dataset = open_dataset(write_domain(tmp_path_factory.mktemp("fog"), "fog"))
    augmentation = named_recipe("miniature", RECIPE).augment
    return TrainingImages(dataset, dataset.samples("train"), augmentation, keys=("t",))


def recipe(**changes):
    loop = {"steps": 30, "warmup_steps": 1, "checkpoint_every": 30}
    return named_recipe("miniature", {**RECIPE, "learning_rate": 0.05, "loop": loop, **changes})


def test_both_bases_satisfy_the_protocol():
    assert isinstance(tiny_base(), OpenVocabularyBase)
    assert isinstance(PixelBase(), OpenVocabularyBase)


def test_training_lowers_the_loss_and_leaves_the_base(images):
    base, losses = PixelBase(), []
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    trained = train_lora(
        base, images, LABELS.names, recipe(), on_step=lambda step, loss: losses.append(loss)
    )
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert list(trained.pairs) == ["pixels", "words", "scores"]
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    values = sum(pair.down.numel() + pair.up.numel() for pair in trained.pairs.values())
    assert values == count_parameters(base, recipe())


@pytest.mark.parametrize("mode", ["plain", "sliding"])
def test_segmentation_with_a_mix_equals_merged_weights(images, mode):
    base, merged = PixelBase(), PixelBase()
    trained = train_lora(base, images, LABELS.names, recipe())
    files = to_peft_files(trained.pairs, base_name=base.name, base_digest=base.digest)
    adapter = load_adapter(files, name="fog")
    with torch.no_grad():
        for name, pair in trained.pairs.items():
            merged.model[name].weight += 0.5 * pair.scale * (pair.up @ pair.down)
    image = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    mix = fuse([adapter], [0.5])
    predictor = Predictor(base, mode=mode)
    together = predictor.predict([image, image], LABELS.names, [mix, None])
    alone = Predictor(merged, mode=mode).predict([image], LABELS.names)[0]
    bare = Predictor(PixelBase(), mode=mode).predict([image], LABELS.names)[0]
    torch.testing.assert_close(together[0], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[1], bare, rtol=1e-5, atol=1e-6)
    assert (alone - bare).abs().max() > 1e-3


def test_a_group_shares_the_features_of_frozen_encoders(images):
    members = [recipe(targets="aggregator", rank=rank) for rank in (1, 2)]
    calls = []

    class Counting(PixelBase):
        def encode_images(self, images):
            calls.append(len(images))
            return super().encode_images(images)

    group = [GroupMember(recipe=member) for member in members]
    together = train_group(Counting(), images, LABELS.names, group)
    assert len(calls) == 30
    for member, trained in zip(members, together, strict=True):
        alone = train_lora(PixelBase(), images, LABELS.names, member)
        assert torch.equal(alone.pairs["scores"].up, trained.pairs["scores"].up)
