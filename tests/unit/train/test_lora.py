import pytest
import torch

from loraseg.adapters.inject import targets
from loraseg.adapters.peft_io import pairs_of
from loraseg.data import DatasetFolder
from loraseg.errors import AdapterMismatchError, ConfigError
from loraseg.train.lora import count_parameters, injected, train_lora
from loraseg.train.recipes import named_recipe
from loraseg.train.segmentation import TrainingImages
from tests.tiny_world import LABELS, write_domain
from tests.unit.tiny import tiny_base
from tests.unit.train.tiny_files import RECIPE


@pytest.fixture
def images(tmp_path):
    recipe = named_recipe("miniature", RECIPE)
    dataset = DatasetFolder.open(write_domain(tmp_path, "fog"))
    return TrainingImages(dataset, dataset.samples("train"), recipe.augment, keys=("t",))


def train(base, images, **changes):
    return train_lora(base, images, LABELS.names, named_recipe("miniature", {**RECIPE, **changes}))


def test_the_base_is_afterwards_as_it_was(images):
    base = tiny_base()
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    modules = {name: type(module) for name, module in base.model.named_modules()}
    train(base, images)
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: type(module) for name, module in base.model.named_modules()} == modules
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


def test_all_pairs_train_and_the_loss_falls(images):
    losses = []
    recipe = named_recipe(
        "miniature",
        {**RECIPE, "learning_rate": 0.01, "loop": {"steps": 30, "warmup_steps": 1}},
    )
    trained = train_lora(
        tiny_base(), images, LABELS.names, recipe, watch=lambda step, loss: losses.append(loss)
    )
    base = tiny_base()
    assert list(trained.pairs) == list(targets(base.model))
    # Methods A.3: the last vision block has values but no attention, so its q and k never act.
    last = "clip_model.visual.transformer.resblocks.1.attn."
    idle = {name for name, pair in trained.pairs.items() if not pair.up.any()}
    assert idle == {f"sem_seg_head.predictor.{last}{x}_proj" for x in "qk"}
    assert {pair.scale for pair in trained.pairs.values()} == {recipe.alpha / recipe.rank}
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_inert_attention_pairs_stay_zero(images):
    trained = train(tiny_base("inert"), images, clip_attention_lora="inert")
    for name, pair in trained.pairs.items():
        attention = ".clip_model." in name and ".attn." in name
        assert bool((pair.up == 0).all()) == attention


def test_inert_and_active_must_agree(images):
    with pytest.raises(ConfigError, match="the recipe says 'inert', the base was loaded as 'acti"):
        train(tiny_base(), images, clip_attention_lora="inert")


def test_fresh_pairs_change_nothing_and_start_as_in_the_reference():
    base = tiny_base()
    recipe = named_recipe("miniature", {"rank": 64})
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base.model(x, base.encode_classes(["sky", "road"]))
        with injected(base.model, recipe, seed=0):
            assert torch.equal(base.model(x, base.encode_classes(["sky", "road"])), plain)
            pairs = pairs_of(base.model)
        with injected(base.model, recipe, seed=1):
            others = pairs_of(base.model)
    for name, pair in pairs.items():
        # Kaiming uniform with a = sqrt(5): uniform within 1 / sqrt(d_in), variance 1 / (3 d_in).
        bound = pair.down.shape[1] ** -0.5
        assert float(pair.down.abs().max()) <= bound
        assert float(pair.down.var()) == pytest.approx(bound**2 / 3, rel=0.2)
        assert not pair.up.any()
        assert not torch.equal(others[name].down, pair.down)


def test_refuses_a_model_that_holds_pairs_already():
    base, recipe = tiny_base(), named_recipe("miniature")
    with injected(base.model, recipe, 0):
        outer = injected(base.model, recipe, 0)
        with pytest.raises(AdapterMismatchError, match="LoRA pairs already"):
            outer.__enter__()
    assert pairs_of(base.model) == {}


def test_counted_is_what_trains():
    base, recipe = tiny_base(), named_recipe("miniature", {"rank": 3})
    with injected(base.model, recipe, 0) as parameters:
        assert all(p.requires_grad for p in parameters.values())
        trainable = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
        assert sum(p.numel() for p in parameters.values()) == trainable
    assert count_parameters(base.model, recipe) == trainable


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"precision": "fp32"}])
def test_twice_gives_the_same_bits(images, change):
    loop = {**RECIPE["loop"], **change}
    first, second = (train(tiny_base(), images, loop=loop).pairs for _ in range(2))
    for name, pair in first.items():
        assert torch.equal(pair.down, second[name].down)
        assert torch.equal(pair.up, second[name].up)


def test_the_seed_of_the_batches_decides_the_start(images, tmp_path):
    dataset = DatasetFolder.open(tmp_path)
    other = TrainingImages(
        dataset, dataset.samples("train"), named_recipe("miniature", RECIPE).augment, seed=1
    )
    first, second = train(tiny_base(), images).pairs, train(tiny_base(), other).pairs
    assert not any(torch.equal(pair.down, second[name].down) for name, pair in first.items())
