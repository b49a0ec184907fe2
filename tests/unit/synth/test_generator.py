"""Images of masks: the same in any batch and order, with adapters, heads, regions and sizes."""

import copy
import logging

import numpy as np
import pytest
import torch

from loraseg.adapters.attention_mix import AttentionMix
from loraseg.adapters.packed import pack
from loraseg.errors import AdapterMismatchError, ConfigError, DatasetError, StageError
from loraseg.seeding import derive
from loraseg.synth.generator import Generator
from loraseg.synth.generator_adapter import GeneratorAdapter
from loraseg.synth.lineage import mask_digest
from loraseg.synth.region_attention import RegionControl
from loraseg.synth.sampling import SamplingConfig
from tests.unit.synth.tiny_generator import (
    DIGEST,
    block_mask,
    make_generator,
    one_thread,  # noqa: F401
    random_adapter,
    tiny_base,
    tiny_pipeline,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]


def fusion(kind="sd"):
    control = RegionControl(tiny_base(kind).unet, alpha_modules=_cross(kind))
    state = control.alpha_state()
    random = torch.Generator().manual_seed(0)
    return AttentionMix(
        {name: torch.randn(value.shape, generator=random) for name, value in state.items()},
        "token",
    )


def _cross(kind):
    return [
        name
        for name, module in tiny_base(kind).unet.named_modules()
        if getattr(module, "is_cross_attention", False)
    ]


def latents(made):
    return {(one.name, one.lineage.k): one.latents for one in made}


@pytest.mark.parametrize(
    ("kind", "scheduler"), [("sd", "pndm"), ("v", "euler-a"), ("sdxl", "pndm")]
)
def test_an_image_is_the_same_alone_in_a_batch_and_in_any_order(kind, scheduler):
    settings = {"images": 3, "steps": 4, "scheduler": scheduler}
    masks = [("a", block_mask(0)), ("b", block_mask(1)), ("c", block_mask(2))]
    reference = latents(make_generator(kind, batch=3, **settings).generate(masks[:1]))
    alone = latents(make_generator(kind, batch=1, **settings).generate(masks[:1]))
    mixed = latents(make_generator(kind, batch=4, **settings).generate(masks))
    turned = latents(make_generator(kind, batch=7, **settings).generate(masks[::-1]))
    for k in range(3):
        for other in (alone, mixed, turned):
            torch.testing.assert_close(other["a", k], reference["a", k], rtol=0, atol=1e-4)
    assert not torch.allclose(reference["a", 0], reference["a", 1], atol=0.1)


@pytest.mark.parametrize("first", [1, 2])
def test_later_images_are_those_of_a_longer_run(first):
    masks, heads = (
        [("a", block_mask(0)), ("b", block_mask(1))],
        [pack(random_adapter("h")), pack(random_adapter("i"))],
    )
    own = make_generator(heads=heads, images=3, steps=2, batch=2)
    weights = np.random.default_rng(0).random((2, 3, 2))
    whole = {(o.mask_name, o.lineage.k): o for o in own.generate(masks, heads=weights)}
    # What is there already was made by a run that wanted fewer images.
    before = make_generator(heads=heads, images=first, steps=2)
    there = list(before.generate(masks, heads=weights[:, :first]))
    later = list(own.generate(masks, heads=weights[:, first:], first=first))
    assert [(o.mask_name, o.lineage.k) for o in later] == [
        (n, k) for n in "ab" for k in range(first, 3)
    ]
    assert {(o.mask_name, o.lineage.k) for o in [*there, *later]} == set(whole)
    for one in (*there, *later):
        expected = whole[one.mask_name, one.lineage.k]
        assert one.lineage.pair_id == expected.lineage.pair_id
        assert one.lineage.seed == expected.lineage.seed
        assert one.lineage.heads == expected.lineage.heads
        torch.testing.assert_close(one.latents, expected.latents, rtol=0, atol=1e-4)


def test_first_image_and_its_head_weights_are_checked_at_once():
    own = make_generator(heads=[pack(random_adapter("h"))], images=3)
    for first in (-1, 3, 4):
        with pytest.raises(ConfigError, match=rf"first: got {first}, expected 0 to 2: 3 images"):
            own.generate([("a", block_mask())], heads=np.ones((1, 3, 1)), first=first)
    with pytest.raises(AdapterMismatchError, match=r"got \(1, 3, 1\), expected \(1, 1, 1\)"):
        own.generate([("a", block_mask())], heads=np.ones((1, 3, 1)), first=2)


def test_regions_decide_where_words_act(monkeypatch):
    first = block_mask(0)
    exchanged = np.array([1, 0, *range(2, 256)], dtype=np.uint8)[first]
    # Another mask has other noise; here it must be the same.
    monkeypatch.setattr("loraseg.synth.generator.mask_digest", lambda _: "one")
    for regions in (True, False):
        own = make_generator(steps=6, images=1, regions=regions)
        one, other = own.generate([("a", first), ("b", exchanged)])
        assert one.lineage.seed == other.lineage.seed
        assert one.lineage.prompt == other.lineage.prompt
        assert torch.allclose(one.latents, other.latents, atol=1e-3) is not regions


def test_stock_pipeline_without_regions():
    own = make_generator(steps=5, images=3, regions=False)
    made = list(own.generate([("a", block_mask(0, (32, 48)))]))
    noises = [
        torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(one.lineage.seed))
        for one in made
    ]
    expected = tiny_pipeline("sd")(
        [one.lineage.prompt for one in made],
        height=32,
        width=48,
        latents=torch.stack(noises),
        num_inference_steps=5,
        guidance_scale=2.0,
        output_type="np",
    ).images
    for one, image in zip(made, expected, strict=True):
        assert one.image.shape == (32, 48, 3)
        assert np.abs(one.image - 255.0 * image).max() <= 0.51
        assert one.image.std() > 1


def test_an_adapter_acts_as_merged_by_hand_and_leaves_no_trace():
    one, two = random_adapter("x"), random_adapter("y", rule="all", size=0.2)
    adapters = [GeneratorAdapter.from_adapter(one, weight=0.7), GeneratorAdapter.from_adapter(two)]
    own = tiny_base()
    before = {name: value.clone() for name, value in own.unet.state_dict().items()}
    processors = dict(own.unet.attn_processors)
    parameters = list(own.unet.parameters())
    got = latents(make_generator(adapters=adapters).generate([("a", block_mask())]))
    bare = latents(make_generator().generate([("a", block_mask())]))
    assert all(a is b for a, b in zip(parameters, own.unet.parameters(), strict=True))
    assert own.unet.attn_processors == processors
    assert all(torch.equal(before[name], value) for name, value in own.unet.state_dict().items())

    merged = copy.deepcopy(tiny_pipeline("sd"))
    for each, weight in ((one, 0.7), (two, 1.0)):
        for name, pair in each.pairs.items():
            merged.unet.get_submodule(name).weight.data += weight * pair.delta()
    by_hand = type(own).from_pipeline(merged, name="merged", digest=DIGEST)
    plain = make_generator()
    expected = latents(
        Generator(by_hand, plain.conditioner, config=plain.config).generate([("a", block_mask())])
    )
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-4)
        assert not torch.allclose(bare[key], value, atol=1e-2)


def test_nothing_acts_between_two_images():
    own = tiny_base()
    run = make_generator(
        adapters=[GeneratorAdapter.from_adapter(random_adapter("x"))], batch=1
    ).generate([("a", block_mask())])
    weight = own.unet.get_submodule(next(iter(random_adapter("x").pairs))).weight
    next(run)
    assert own.unet.get_submodule(next(iter(random_adapter("x").pairs))).weight is weight
    list(
        make_generator().generate([("a", block_mask())])
    )  # another generator may use the base meanwhile
    assert len(list(run)) == 1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_heads_act_per_image_as_alone(guidance):
    """The door for several heads on one shared side: every image has weights of its own."""
    shared, heads = (
        random_adapter("x", size=0.2),
        [random_adapter("h"), random_adapter("i"), random_adapter("j")],
    )
    company = GeneratorAdapter.from_adapter(shared, weight=0.5)
    settings = {"guidance": guidance, "steps": 2}
    weights = np.array([[[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.3, 0.3, 0.4]]])
    masks = [("a", block_mask(0)), ("b", block_mask(1))]
    own = make_generator(
        heads=[pack(head) for head in heads], adapters=[company], batch=3, **settings
    )
    got = list(own.generate(masks, heads=weights))
    for index, made in enumerate(got):
        row = weights[index // 2, index % 2]
        adapters = [
            company,
            *(
                GeneratorAdapter.from_adapter(h, weight=float(w))
                for h, w in zip(heads, row, strict=True)
            ),
        ]
        alone = make_generator(adapters=adapters, batch=1, **settings)
        expected = list(alone.generate([masks[index // 2]]))[index % 2]
        torch.testing.assert_close(made.latents, expected.latents, rtol=0, atol=1e-4)
        assert [used.weight for used in made.lineage.heads] == list(row)
    (other,) = own.generate(masks[:1], heads=weights[:1, :1], first=1)
    assert other.lineage.k == got[1].lineage.k
    assert other.lineage.pair_id != got[1].lineage.pair_id
    assert len({float(made.latents.sum()) for made in got}) == 4


def test_head_weights_must_be_there_for_heads_only():
    with pytest.raises(AdapterMismatchError, match=r"head weights: got \(1, 2, 1\), expected None"):
        make_generator().generate([("a", block_mask())], heads=np.ones((1, 2, 1)))
    own = make_generator(heads=[pack(random_adapter("h"))])
    with pytest.raises(AdapterMismatchError, match=r"got None, expected \(1, 2, 1\)"):
        own.generate([("a", block_mask())])


def test_fusion_layers_are_those_of_the_one_adapter_that_has_some():
    layers = fusion()
    plain = GeneratorAdapter.from_adapter(random_adapter("x"))
    fused = GeneratorAdapter.from_adapter(random_adapter("x"), attention_mix=layers)
    masks = [("a", block_mask())]
    [first, _] = make_generator(adapters=[plain]).generate(masks)
    [second, _] = make_generator(adapters=[fused]).generate(masks)
    assert not torch.allclose(first.latents, second.latents, atol=1e-3)
    assert first.lineage.pair_id != second.lineage.pair_id
    other = GeneratorAdapter.from_adapter(random_adapter("y"), attention_mix=layers)
    with pytest.raises(AdapterMismatchError, match=r"'x', 'y' all have fusion layers"):
        make_generator(adapters=[fused, other])


def test_an_adapter_of_another_base_or_shape_is_refused():
    wrong = GeneratorAdapter.from_adapter(random_adapter("x", base_digest="cd" * 32))
    with pytest.raises(AdapterMismatchError, match=r"'x': trained on base cdcdcdcdcdcd, expected"):
        make_generator(adapters=[wrong])
    with pytest.raises(AdapterMismatchError, match=r"no linear layer|got an adapter for a weight"):
        make_generator(adapters=[GeneratorAdapter.from_adapter(random_adapter("x", kind="sdxl"))])


@pytest.mark.parametrize(
    ("first", "second", "messages"),
    [
        (None, None, []),
        ((), None, []),
        ((), ("x" * 8,), []),
        ((), (), ["neither was trained with the other"]),
        (("z" * 8,), ("x" * 8,), ["'x' was trained with adapter zzzzzzzz active, which is not"]),
    ],
)
def test_adapters_in_another_company_than_in_training_are_warned_of(
    first, second, messages, caplog
):
    pair = [
        GeneratorAdapter(adapter=pack(random_adapter("x")), trained_with=first),
        GeneratorAdapter(adapter=pack(random_adapter("y")), trained_with=second),
    ]
    with caplog.at_level(logging.WARNING, logger="loraseg.synth.generator_adapter"):
        make_generator(adapters=pair)
    assert len(caplog.messages) == len(messages)
    for message, expected in zip(caplog.messages, messages, strict=True):
        assert expected in message


def test_sizes():
    own = make_generator(images=1, steps=2)
    with pytest.raises(DatasetError, match=r"mask 'a': 30 x 33 pixels, expected multiples of 4"):
        own.generate([("a", np.zeros((30, 33), dtype=np.uint8))])
    with pytest.raises(DatasetError, match=r"such as 32 x 32, and the mask is resized"):
        own.generate([("a", np.zeros((30, 33), dtype=np.uint8))])
    with pytest.raises(ConfigError, match=r"size 30 x 32: expected multiples of 4, such as"):
        make_generator(size=(30, 32)).generate([("a", block_mask())])
    odd = np.zeros((30, 33), dtype=np.uint8)
    odd[:15], odd[:, 30:] = 1, 255
    [made] = make_generator(images=1, steps=2, size=(16, 24)).generate([("a", odd)])
    assert made.image.shape == (16, 24, 3)
    assert made.label.shape == (16, 24)
    assert set(np.unique(made.label)) == {0, 1, 255}
    assert made.lineage.mask_id == mask_digest(odd)
    # Masks of several sizes in one call; each batch has one size.
    sizes = [(16, 16), (16, 24), (16, 24), (16, 16)]
    masks = [(str(index), block_mask(index, size)) for index, size in enumerate(sizes)]
    assert [one.image.shape[:2] for one in own.generate(masks)] == sizes


def test_masks_without_a_prompt_are_named():
    own = make_generator(images=1, steps=2)
    for broken, message in (
        (np.full((32, 32), 9, dtype=np.uint8), r"mask 'bad': got class ids \[9\]"),
        (np.full((32, 32), 255, dtype=np.uint8), r"mask 'bad': every pixel is ignored"),
    ):
        with pytest.raises(DatasetError, match=message):
            list(own.generate([("bad", broken)]))
    with pytest.raises(DatasetError, match=r"mask 'bad': got float64"):
        own.generate([("bad", np.zeros((32, 32)))])


def test_templates_per_mask():
    own = make_generator(images=1, steps=2)
    made = list(
        own.generate(
            [("a", block_mask(0)), ("b", block_mask(0))],
            templates=["{classes} in heavy fog", "{classes}"],
        )
    )
    assert made[0].lineage.prompt == made[1].lineage.prompt + " in heavy fog"
    assert made[0].lineage.pair_id != made[1].lineage.pair_id
    assert made[1].lineage.generator == own.digest
    with pytest.raises(ConfigError, match="templates: got 1, expected one for each mask"):
        own.generate([("a", block_mask()), ("b", block_mask())], templates=["{classes}"])


def test_text_is_encoded_once_a_prompt_over_the_generators_life():
    own = make_generator(images=3, batch=2, steps=2)
    before = tiny_base().encoded_prompts
    list(own.generate([("a", block_mask(0)), ("b", block_mask(0)), ("c", block_mask(1))]))
    list(own.generate([("a", block_mask(0))]))
    prompts = {own.conditioner(block_mask(index)).prompt for index in (0, 1)}
    assert tiny_base().encoded_prompts - before == len(prompts) + 1  # and the empty one


def test_lineage_and_label():
    one = GeneratorAdapter.from_adapter(random_adapter("x"), weight=0.5)
    own = make_generator(adapters=[one], seed=9, steps=2)
    made = list(own.generate([("a", block_mask(0)), ("b", block_mask(1))]))
    told = made[3].lineage
    assert (told.k, told.mask_id) == (1, mask_digest(block_mask(1)))
    assert told.seed == derive(9, "synth", told.mask_id, 1)
    assert told.adapters[0].weight == 0.5
    assert told.adapters[0].digest == "x" * 8
    assert told.base == {"name": "tiny sd", "digest": DIGEST}
    assert (made[3].label == block_mask(1)).all()
    assert len({one.lineage.pair_id for one in made}) == 4
    again = list(
        make_generator(adapters=[one], seed=9, steps=2, batch=1).generate([("c", block_mask(1))])
    )
    assert [a.lineage.pair_id for a in again] == [b.lineage.pair_id for b in made[2:]]
    for other in (
        {"seed": 8},
        {"seed": 9, "adapters": []},
        {"seed": 9, "guidance": 3.0},
        {"seed": 9, "steps": 3},
        {"seed": 9, "regions": False},
        {"seed": 9, "template": "a photo of {classes}"},
    ):
        changed_settings = {"adapters": [one], "steps": 2, **other}
        [changed, _] = make_generator(**changed_settings).generate([("c", block_mask(1))])
        assert changed.lineage.pair_id not in {one.lineage.pair_id for one in made}


def test_precision_must_be_that_of_the_base():
    with pytest.raises(ConfigError, match=r"is in torch.float32, the config says bf16"):
        Generator(
            tiny_base(), make_generator().conditioner, config=SamplingConfig(precision="bf16")
        )


def test_foreign_attention_processors_are_refused():
    own = make_generator(images=1, steps=2)
    other = RegionControl(tiny_base().unet)
    with other.installed(), pytest.raises(StageError, match="processor"):
        list(own.generate([("a", block_mask())]))
