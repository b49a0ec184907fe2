import gc
import itertools

import numpy as np
import pytest
import torch

from loraseg.adapters.targets.layer_report import LayerReport
from loraseg.errors import ConfigError
from loraseg.probes.gradient import GradientProbeConfig, gradient_probe, relative_changes
from loraseg.train.generator_adapters.training import finetune_unet
from tests.unit.train.tiny_generator import denoising_data, tiny_generator, tiny_recipe


def config_of(**changes):
    return GradientProbeConfig(
        **{"epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "stop_overlap": 1.0, **changes}
    )


@pytest.fixture
def base():
    return tiny_generator()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Latents and prompts are encoded once."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture
def data(base, folder):
    return denoising_data(folder, base, tiny_recipe())


def weights(base):
    return {name: value.detach().clone() for name, value in base.unet.state_dict().items()}


def change(after, before):
    """|after - before| / |before| in float64, by plain sums."""
    before, after = before.numpy().astype(np.float64), after.numpy().astype(np.float64)
    return np.sqrt(((after - before) ** 2).sum()) / np.sqrt((before**2).sum())


def test_scores_are_the_relative_changes_of_full_tuning(base, data):
    before = weights(base)
    config = config_of()
    report = gradient_probe(base, data, config)
    after = finetune_unet(base, data, config.recipe(len(data))).unet
    names = {name.removesuffix(".weight") for name in before if name.endswith(".weight")}
    assert {score.name for score in report.scores} == names
    for score in report.scores:
        key = f"{score.name}.weight"
        assert score.score == pytest.approx(change(after[key], before[key]), rel=1e-6)
        assert score.numel == before[key].numel()
        assert len(score.history) == 2
        assert score.history[-1] == score.score


def test_first_epoch_of_the_history_is_a_run_of_one_epoch(base, data):
    two = gradient_probe(base, data, config_of(epochs=2))
    one = gradient_probe(base, data, config_of(epochs=1))
    assert {s.name: s.history[0] for s in two.scores} == {s.name: s.score for s in one.scores}


def test_base_is_as_it_was(base, data):
    before = weights(base)
    gradient_probe(base, data, config_of(epochs=1))
    after = base.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None and not p.requires_grad for p in base.unet.parameters())


def test_same_seed_gives_the_same_bytes(base, data, folder):
    first = gradient_probe(base, data, config_of()).to_bytes()
    assert gradient_probe(base, data, config_of()).to_bytes() == first
    other = denoising_data(folder, base, tiny_recipe(), seed=1)
    assert gradient_probe(base, other, config_of()).to_bytes() != first


def test_report_says_what_it_rests_on_and_can_be_read_back(base, data):
    seen = []
    report = gradient_probe(base, data, config_of(), on_step=lambda done, _: seen.append(done))
    steps = 2 * -(-len(data) // 4)
    assert seen == list(range(1, steps + 1))
    assert report.samples == {
        "views": len(data),
        "epochs": 2,
        "steps": steps,
        "layers_left_out": 0,
    }
    assert (report.method, report.base_digest) == ("gradient", base.digest)
    assert report.settings["learning_rate"] == 1e-3
    assert report.settings["seed"] == data.seed
    assert len(report.settings["overlaps"]) == 1
    again = LayerReport.from_bytes(report.to_bytes())
    assert again.to_bytes() == report.to_bytes()
    assert again.scores == report.scores


def test_stops_when_the_head_of_the_ranking_has_settled(base, data):
    # The overlap that counts is that of the projections, not of all layers.
    report = gradient_probe(base, data, config_of(epochs=4, top=6, stop_overlap=1e-9))
    assert report.samples["epochs"] == 2
    heads = [
        {s.name for s in sorted(of, key=lambda s: (-s.history[epoch], s.name))[:6]}
        for of in [report.projections().scores]
        for epoch in range(2)
    ]
    expected = len(heads[0] & heads[1]) / len(heads[0] | heads[1])
    assert report.settings["overlaps"] == [expected]


def test_goes_on_while_the_ranking_moves(base, data, monkeypatch):
    # The head holds another projection after each epoch.
    names = itertools.cycle(["to_q", "to_k"])

    def changes(unet, before):
        leading = next(names)
        return {
            name: 2.0 if f"attn1.{leading}" in name else 1.0 for name, _ in unet.named_parameters()
        }

    monkeypatch.setattr("loraseg.probes.gradient.relative_changes", changes)
    report = gradient_probe(base, data, config_of(epochs=3, top=2, stop_overlap=0.9))
    assert report.samples["epochs"] == 3
    assert report.settings["overlaps"] == [0.0, 0.0]


def test_leaves_zero_initialised_layers_out(base, data):
    with torch.no_grad():
        base.unet.conv_out.weight.zero_()
        base.unet.time_embedding.linear_1.weight.mul_(1e-12)
    report = gradient_probe(base, data, config_of(epochs=1))
    names = {score.name for score in report.scores}
    assert not names & {"conv_out", "time_embedding.linear_1"}
    assert "conv_in" in names
    assert report.samples["layers_left_out"] == 2


def test_relative_changes_of_every_tensor():
    module = torch.nn.Linear(2, 2)
    before = {"weight": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "bias": torch.zeros(2)}
    with torch.no_grad():
        module.weight.copy_(before["weight"] + torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert relative_changes(module, before) == {"weight": pytest.approx(0.2)}


def test_one_copy_of_the_weights_waits_meanwhile(base, data):
    original = base.unet.conv_in.weight.detach().clone()
    found = []

    def count(done, loss):
        found.append(
            sum(
                type(one) is torch.Tensor
                and one is not original
                and one.shape == original.shape
                and torch.equal(one, original)
                for one in gc.get_objects()
            )
        )

    gradient_probe(base, data, config_of(), on_step=count)
    assert set(found) == {1}


@pytest.mark.gpu
def test_accelerator_holds_no_second_copy(tmp_path):
    base = tiny_generator()
    data = denoising_data(tmp_path, base, tiny_recipe())
    base.to("cuda")
    held = []

    def changes(unet, before):
        held.append({value.device.type for value in before.values()})
        return relative_changes(unet, before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraseg.probes.gradient.relative_changes", changes)
        report = gradient_probe(base, data, config_of())
    assert held == [{"cpu"}, {"cpu"}]
    on_cpu = gradient_probe(base.to("cpu"), data, config_of())
    there = {score.name: score.score for score in report.scores}
    for score in on_cpu.scores:
        assert there[score.name] == pytest.approx(score.score, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"top": 0}, "top"),
        ({"share": 0.0}, "share"),
        ({"stop_overlap": 1.5}, "stop_overlap"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_config_is_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


def test_more_projections_than_there_are(base, data):
    with pytest.raises(ConfigError, match=r"top 1000, expected at most \d+"):
        gradient_probe(base, data, config_of(top=1000))


def test_half_precision_weights_are_refused(base, data):
    with pytest.raises(ConfigError, match=r"bfloat16, expected torch\.float32"):
        gradient_probe(base.to("cpu", torch.bfloat16), data, config_of())
