import dataclasses

import pytest
import torch

from loraseg.adapters.init import INITIALISERS, init_lora
from loraseg.adapters.targets.catseg import TARGET_RULES, target_modules
from loraseg.data import open_dataset
from loraseg.errors import ConfigError, DatasetError, StageError
from loraseg.storage import open_store
from loraseg.train.core.checkpoint import CheckpointStore
from loraseg.train.core.lora import init_pairs
from loraseg.train.segmenter_adapters.recipes import RULES_WITHOUT_CLIP, named_recipe
from loraseg.train.segmenter_adapters.samples import TrainingImages
from loraseg.train.segmenter_adapters.training import (
    GroupMember,
    count_parameters,
    train_group,
    train_lora,
)
from tests.tiny_training import LABELS, write_domain
from tests.unit.tiny import tiny_base
from tests.unit.train.interruption import Interrupted, interrupt_at
from tests.unit.train.tiny_files import RECIPE


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(write_domain(tmp_path_factory.mktemp("fog"), "fog"))


@pytest.fixture(scope="module")
def images(dataset):
    recipe = named_recipe("miniature", RECIPE)
    return TrainingImages(dataset, dataset.samples("train"), recipe.augment, keys=("t",))


@pytest.fixture(scope="module")
def plain(images):
    """Pairs trained with the recipe of most tests."""
    return train(tiny_base(), images).pairs


def train(base, images, **changes):
    return train_lora(base, images, LABELS.names, named_recipe("miniature", {**RECIPE, **changes}))


def test_the_base_is_unchanged_afterwards(images):
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


def test_all_pairs_train_and_the_loss_decreases(images):
    losses = []
    recipe = named_recipe(
        "miniature",
        {**RECIPE, "learning_rate": 0.01, "loop": {"steps": 30, "warmup_steps": 1}},
    )
    trained = train_lora(
        tiny_base(), images, LABELS.names, recipe, on_step=lambda step, loss: losses.append(loss)
    )
    base = tiny_base()
    assert list(trained.pairs) == list(target_modules(base.model))
    # The last vision block of CAT-Seg has values but no attention: its q and k have no effect.
    last = "clip_model.visual.transformer.resblocks.1.attn."
    idle = {name for name, pair in trained.pairs.items() if not pair.up.any()}
    assert idle == {f"sem_seg_head.predictor.{last}{x}_proj" for x in "qk"}
    assert {pair.scale for pair in trained.pairs.values()} == {recipe.alpha / recipe.rank}
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_recipe_selects_the_initialiser(images, plain, monkeypatch):
    def init_negated(*arguments, **options):
        initial = init_lora(*arguments, **options)
        pairs = {module: (-down, up) for module, (down, up) in initial.pairs.items()}
        return dataclasses.replace(initial, pairs=pairs)

    monkeypatch.setitem(INITIALISERS, "negated", init_negated)
    negated = train(tiny_base(), images, init="negated").pairs
    for module, pair in plain.items():
        # The gradients of both factors are odd in the factors and AdamW is odd in the gradients.
        assert torch.equal(negated[module].down, -pair.down)
        assert torch.equal(negated[module].up, -pair.up)


def test_inert_attention_pairs_stay_zero(images):
    trained = train(tiny_base("inert"), images, clip_attention_lora="inert")
    for name, pair in trained.pairs.items():
        attention = ".clip_model." in name and ".attn." in name
        assert bool((pair.up == 0).all()) == attention


def test_inert_and_active_must_agree(images):
    with pytest.raises(ConfigError, match="the recipe says 'inert', the base was loaded as 'acti"):
        train(tiny_base(), images, clip_attention_lora="inert")


def test_the_count_is_the_number_of_trained_values():
    base, recipe = tiny_base(), named_recipe("miniature", {"rank": 3})
    names = target_modules(base.model, recipe.targets)
    parameters = init_pairs(base.model, names, rank=3, alpha=1.0, seed=0).parameters()
    assert sum(p.numel() for p in parameters.values()) == count_parameters(base, recipe)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_two_runs_give_the_same_bits(images, precision):
    loop = {**RECIPE["loop"], "steps": 4, "precision": precision}
    first, second = (train(tiny_base(), images, loop=loop).pairs for _ in range(2))
    for name, pair in first.items():
        assert torch.equal(pair.down, second[name].down)
        assert torch.equal(pair.up, second[name].up)


def test_the_seed_of_the_batches_decides_the_initial_pairs(dataset, plain):
    other = TrainingImages(
        dataset, dataset.samples("train"), named_recipe("miniature", RECIPE).augment, seed=1
    )
    pairs = train(tiny_base(), other).pairs
    assert not any(torch.equal(pair.down, pairs[name].down) for name, pair in plain.items())


GROUP = {
    "one": {},
    "wide": {"rank": 3, "alpha": 6.0},
    "short": {"learning_rate": 3e-3, "loop": {**RECIPE["loop"], "steps": 4}},
    "strict": {"mask_ignored": True, "weight_decay": 0.1},
}


def member(name, store=None, **changes):
    recipe = {**RECIPE, "targets": "aggregator", **GROUP[name], **changes}
    slot = store and CheckpointStore(store.with_prefix(name))
    return GroupMember(recipe=named_recipe("miniature", recipe), checkpoints=slot)


def same(first, second):
    assert first.pairs.keys() == second.pairs.keys()
    return all(
        torch.equal(pair.down, second.pairs[name].down)
        and torch.equal(pair.up, second.pairs[name].up)
        for name, pair in first.pairs.items()
    )


@pytest.fixture(scope="module")
def alone(images):
    """The pairs of each member trained alone."""
    return {
        name: train_group(tiny_base(), images, LABELS.names, [member(name)])[0] for name in GROUP
    }


@pytest.mark.parametrize("order", [tuple(GROUP), tuple(reversed(GROUP)), ("wide", "short")])
def test_a_member_is_the_same_alone_and_in_any_group(images, alone, order):
    together = train_group(tiny_base(), images, LABELS.names, [member(name) for name in order])
    for name, trained in zip(order, together, strict=True):
        assert same(trained, alone[name])
    assert not same(alone["one"], alone["strict"])


@pytest.mark.parametrize("rule", ["semla", "aggregator"])
def test_groups_may_adapt_clip(images, alone, rule):
    names = ("one", "wide")
    members = [member(name, targets=rule) for name in names]
    together = train_group(tiny_base(), images, LABELS.names, members)
    for name, one, trained in zip(names, members, together, strict=True):
        if rule == "aggregator":
            single = alone[name]
        else:
            (single,) = train_group(tiny_base(), images, LABELS.names, [one])
        assert same(trained, single)
        assert all(pair.up.any() for pair in trained.pairs.values()) == (rule == "aggregator")


def test_an_error_of_one_member_does_not_end_the_others(images, alone):
    broken = member("one", learning_rate=1e38, alpha=1e8)
    outcomes = train_group(
        tiny_base(), images, LABELS.names, [member("wide"), broken, member("short")]
    )
    assert isinstance(outcomes[1], StageError)
    assert same(outcomes[0], alone["wide"])
    assert same(outcomes[2], alone["short"])


def test_a_broken_batch_keeps_finished_members(images, alone, monkeypatch):
    steps = member("short").recipe.loop.steps
    batch = images.batch

    def break_later(step, size):
        if step >= steps:
            raise DatasetError("a file is gone")
        return batch(step, size)

    monkeypatch.setattr(images, "batch", break_later)
    outcomes = train_group(
        tiny_base(), images, LABELS.names, [member("short"), member("one"), member("wide")]
    )
    assert same(outcomes[0], alone["short"])
    assert all(isinstance(outcome, DatasetError) for outcome in outcomes[1:])


def test_members_resume_from_their_own_checkpoints(images, alone, tmp_path):
    store = open_store(str(tmp_path / "checkpoints"))
    train_group(tiny_base(), images, LABELS.names, [member("short", store)])
    halfway = dataclasses.replace(member("one", store), on_step=interrupt_at(5))
    with pytest.raises(Interrupted):
        train_group(tiny_base(), images, LABELS.names, [member("wide"), halfway])
    names = ("wide", "one", "short")
    outcomes = train_group(
        tiny_base(), images, LABELS.names, [member(name, store) for name in names]
    )
    assert [trained.loop.resumed_from_step for trained in outcomes] == [0, 4, 4]
    assert all(same(trained, alone[name]) for name, trained in zip(names, outcomes, strict=True))


def test_members_must_agree_on_what_they_share(images):
    members = [member("one"), member("one", batch_size=3)]
    with pytest.raises(ConfigError, match="recipes of one group may differ in name, rank"):
        train_group(tiny_base(), images, LABELS.names, members)


@pytest.mark.parametrize("rule", TARGET_RULES)
def test_rules_without_clip_adapt_neither_encoder(rule):
    base = tiny_base()
    names = base.target_modules(rule)
    assert base.adapts_images(names) == (rule not in RULES_WITHOUT_CLIP)
    assert base.adapts_text(names) == (rule not in RULES_WITHOUT_CLIP)
    if rule in RULES_WITHOUT_CLIP:
        assert not any(".clip_model." in name for name in names)
