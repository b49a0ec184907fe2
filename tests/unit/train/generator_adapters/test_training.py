"""Training of generator adapters: reproducibility, averages, and an unchanged base."""

import dataclasses

import pytest
import torch

from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.storage import open_store
from loraseg.train.core.checkpoint import CheckpointStore
from loraseg.train.generator_adapters.training import (
    Callbacks,
    base_model_loss,
    finetune_unet,
    train_generator,
)
from tests.unit.train.interruption import Interrupted, interrupt_at
from tests.unit.train.tiny_generator import denoising_data, tiny_generator, tiny_recipe


@pytest.fixture(scope="module")
def base():
    return tiny_generator()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def data(base, folder):
    return denoising_data(folder, base, tiny_recipe())


@pytest.fixture(scope="module")
def plain(base, data):
    return train_generator(base, data, tiny_recipe())


@pytest.fixture(scope="module")
def averaged(base, data):
    return train_generator(base, data, tiny_recipe(loop={"ema_decay": 0.9}))


@pytest.fixture(scope="module")
def tuned(base, data):
    recipe = tiny_recipe(learning_rate=1e-3)
    return finetune_unet(base, data, recipe, Callbacks(score_data={"all": data}))


def same(one, other):
    assert one.pairs.keys() == other.pairs.keys()
    assert one.alphas.keys() == other.alphas.keys()
    return all(
        torch.equal(pair.down, other.pairs[name].down)
        and torch.equal(pair.up, other.pairs[name].up)
        for name, pair in one.pairs.items()
    ) and all(torch.equal(value, other.alphas[name]) for name, value in one.alphas.items())


def close(one, other, **tolerance):
    for name, pair in one.pairs.items():
        torch.testing.assert_close(pair.down, other.pairs[name].down, **tolerance)
        torch.testing.assert_close(pair.up, other.pairs[name].up, **tolerance)
    for name, value in one.alphas.items():
        torch.testing.assert_close(value, other.alphas[name], **tolerance)


def snapshot(base):
    return {name: value.clone() for name, value in base.unet.state_dict().items()}


def test_gradient_checkpointing_changes_neither_gradients_nor_the_base(base, data, plain):
    before, processors = snapshot(base), dict(base.unet.attn_processors)
    close(train_generator(base, data, tiny_recipe(recompute=True)), plain, rtol=0, atol=1e-6)
    after = base.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert base.unet.attn_processors == processors
    assert not base.unet.is_gradient_checkpointing
    assert not base.unet.training
    assert all(p.grad is None for p in base.unet.parameters())


def test_all_pairs_and_attention_mix_layers_train(plain):
    assert all(pair.up.any() for pair in plain.pairs.values())
    assert len(plain.alphas) == 14
    assert all((value != -2).all() for key, value in plain.alphas.items() if "bias" in key)
    assert all(value.any() for key, value in plain.alphas.items() if "weight" in key)
    assert {pair.scale for pair in plain.pairs.values()} == {1.0}


def test_the_loss_falls_below_that_of_the_base(base, folder):
    recipe = tiny_recipe(
        rank=8, learning_rate=0.05, batch_size=4, loop={"steps": 12, "checkpoint_every": 12}
    )
    data = denoising_data(folder, base, recipe)
    trained = train_generator(base, data, recipe, Callbacks(score_data={"all": data}))
    assert trained.losses["all"] < base_model_loss(base, data, recipe) - 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_give_the_same_bits(base, folder, data, precision):
    recipe = tiny_recipe(loop={"precision": precision, "steps": 3})
    first, second = (train_generator(base, data, recipe) for _ in range(2))
    assert same(first, second)
    other = train_generator(base, denoising_data(folder, base, recipe, seed=1), recipe)
    assert not same(first, other)


@pytest.mark.parametrize(("kills", "ema"), [((1,), 0.9), ((3, 5), None), ((3, 6), 0.9)])
def test_a_killed_run_resumes_to_the_same_bits(request, base, data, tmp_path, kills, ema):
    recipe = tiny_recipe(loop={"ema_decay": ema})
    slot = CheckpointStore(open_store(str(tmp_path)))
    for step in kills:
        with pytest.raises(Interrupted):
            train_generator(
                base, data, recipe, Callbacks(checkpoints=slot, on_step=interrupt_at(step))
            )
    resumed = train_generator(base, data, recipe, Callbacks(checkpoints=slot))
    assert resumed.loop.resumed_from_step == max(kills) // 2 * 2
    assert same(resumed, request.getfixturevalue("averaged" if ema else "plain"))


def test_microbatches_add_up_to_the_batch(base, folder):
    loop = {"steps": 2, "warmup_steps": 1}
    whole, parted, odd = (
        train_generator(
            base,
            denoising_data(folder, base, tiny_recipe()),
            tiny_recipe(batch_size=6, accumulate=count, loop=loop),
        )
        for count in (1, 3, 4)
    )
    close(whole, parted, rtol=0, atol=1e-4)
    close(whole, odd, rtol=0, atol=1e-4)
    assert whole.loop.loss == pytest.approx(parted.loop.loss, rel=1e-5)


def test_the_average_is_kept(averaged, plain):
    assert averaged.loop.loss == plain.loop.loss
    assert not same(averaged, plain)


def test_without_regions_there_are_no_attention_mix_layers(base, folder, plain):
    recipe = tiny_recipe(draws={"regions": False})
    trained = train_generator(base, denoising_data(folder, base, recipe), recipe)
    assert trained.alphas == {}
    assert trained.loop.loss != plain.loop.loss


def test_mode_off_uses_rectified_attention_only(base, data, plain):
    trained = train_generator(base, data, tiny_recipe(fusion={"mode": "off"}))
    assert trained.alphas == {}
    pooled = train_generator(base, data, tiny_recipe(fusion={"mode": "pooled"}))
    assert len({t.loop.loss for t in (trained, pooled, plain)}) == 3


def test_sdxl_trains(tmp_path):
    base = tiny_generator("sdxl")
    recipe = tiny_recipe(loop={"steps": 2, "warmup_steps": 1})
    trained = train_generator(base, denoising_data(tmp_path, base, recipe), recipe)
    assert any(pair.up.any() for pair in trained.pairs.values())


def test_sample_grids_see_the_bare_unet_and_change_nothing(base, data, plain):
    seen = []

    def show(step, kept):
        assert not any("forward" in vars(module) for module in base.unet.modules())
        seen.append((step, kept))

    shown = train_generator(
        base, data, tiny_recipe(grid={"every": 3}), Callbacks(on_sample_grid=show)
    )
    assert [step for step, _ in seen] == [3, 6]
    assert seen[1][1].adapter(base, tiny_recipe()).attention_mix is not None
    assert same(shown, plain)
    assert same(seen[1][1], dataclasses.replace(plain, loop=None))


def test_a_sample_grid_lost_by_a_kill_is_drawn_on_resume(base, data, tmp_path):
    slot = CheckpointStore(open_store(str(tmp_path)))
    recipe, seen = tiny_recipe(grid={"every": 2}), []
    with pytest.raises(Interrupted):
        train_generator(base, data, recipe, Callbacks(checkpoints=slot, on_step=interrupt_at(4)))
    train_generator(
        base,
        data,
        recipe,
        Callbacks(checkpoints=slot, on_sample_grid=lambda step, _: seen.append(step)),
    )
    assert seen == [4, 6]


def test_an_infinite_loss_is_an_error(base, data):
    with pytest.raises(StageError, match=r"the (loss|gradient norm) is"):
        train_generator(base, data, tiny_recipe(learning_rate=1e38, alpha=1e8))
    before = snapshot(base)
    assert all(torch.isfinite(value).all() for value in before.values())


def test_unknown_layers_are_refused(base, data):
    with pytest.raises(AdapterMismatchError, match="no linear layer 'mid_block'"):
        train_generator(base, data, tiny_recipe(targets=["mid_block"]))


def test_full_fine_tuning_changes_every_weight_and_restores_the_base(base, data, tuned):
    before = snapshot(tiny_generator())
    assert tuned.losses["all"] < base_model_loss(base, data, tiny_recipe(learning_rate=1e-3))
    after = base.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad for p in base.unet.parameters())
    moved = [not torch.equal(tuned.unet[name], value) for name, value in before.items()]
    assert all(moved)
    assert len(tuned.alphas) == 14
    assert tuned.loop.resumed_from_step == 0


def test_full_fine_tuning_resumes_to_the_same_bits(base, data, tuned, tmp_path):
    recipe = tiny_recipe(learning_rate=1e-3)
    slot = CheckpointStore(open_store(str(tmp_path)))
    with pytest.raises(Interrupted):
        finetune_unet(base, data, recipe, Callbacks(checkpoints=slot, on_step=interrupt_at(3)))
    resumed = finetune_unet(base, data, recipe, Callbacks(checkpoints=slot))
    assert resumed.loop.resumed_from_step == 2
    assert all(torch.equal(value, tuned.unet[name]) for name, value in resumed.unet.items())


def test_gradient_checkpointing_that_is_already_enabled_is_refused(base, data):
    base.unet.enable_gradient_checkpointing()
    try:
        with pytest.raises(ConfigError, match="is on already"):
            train_generator(base, data, tiny_recipe(recompute=True))
    finally:
        base.unet.disable_gradient_checkpointing()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_gpu_trains_like_the_cpu(tmp_path, kind):
    recipe = tiny_recipe(recompute=True, loop={"ema_decay": 0.5})
    trained = []
    for device in ("cpu", "cuda"):
        base = tiny_generator(kind).to(device)
        trained.append(train_generator(base, denoising_data(tmp_path, base, recipe), recipe))
    close(*trained, rtol=0, atol=5e-3)
