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


def probe_config(**changes):
    return GradientProbeConfig(
        **{"epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "stop_overlap": 1.0, **changes}
    )


@pytest.fixture
def base():
    return tiny_generator()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of the dataset and of the encoded latents and prompts, which the tests share."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def data(base, folder):
    return denoising_data(folder, base, tiny_recipe())


def weights(base):
    return {name: value.detach().clone() for name, value in base.unet.state_dict().items()}


def change(after, before):
    """|after - before| / |before| in float64, from sums of squares."""
    before, after = before.numpy().astype(np.float64), after.numpy().astype(np.float64)
    return np.sqrt(((after - before) ** 2).sum()) / np.sqrt((before**2).sum())


def test_scores_are_the_relative_changes_of_full_tuning(base, data):
    before = weights(base)
    config = probe_config()
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


def test_first_epoch_of_the_history_equals_a_run_of_one_epoch(base, data):
    two = gradient_probe(base, data, probe_config(epochs=2))
    one = gradient_probe(base, data, probe_config(epochs=1))
    assert {s.name: s.history[0] for s in two.scores} == {s.name: s.score for s in one.scores}


def test_base_is_restored(base, data):
    before = weights(base)
    gradient_probe(base, data, probe_config(epochs=1))
    after = base.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None and not p.requires_grad for p in base.unet.parameters())


def test_equal_seeds_give_equal_bytes(base, data, folder):
    first = gradient_probe(base, data, probe_config()).to_bytes()
    assert gradient_probe(base, data, probe_config()).to_bytes() == first
    other = denoising_data(folder, base, tiny_recipe(), seed=1)
    assert gradient_probe(base, other, probe_config()).to_bytes() != first


def test_report_names_its_inputs_and_can_be_read_back(base, data):
    done_steps = []
    report = gradient_probe(
        base, data, probe_config(), on_step=lambda done, _: done_steps.append(done)
    )
    steps = 2 * -(-len(data) // 4)
    assert done_steps == list(range(1, steps + 1))
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


def test_stops_when_the_leading_projections_are_stable(base, data):
    # The overlap is that of the projections, not of all layers.
    report = gradient_probe(base, data, probe_config(epochs=4, top=6, stop_overlap=1e-9))
    assert report.samples["epochs"] == 2
    projections = report.projections().scores
    leading = [
        {s.name for s in sorted(projections, key=lambda s: (-s.history[epoch], s.name))[:6]}
        for epoch in range(2)
    ]
    expected = len(leading[0] & leading[1]) / len(leading[0] | leading[1])
    assert report.settings["overlaps"] == [expected]


def test_continues_while_the_leading_projections_change(base, data, monkeypatch):
    # Another projection leads after each epoch.
    leading_names = itertools.cycle(["to_q", "to_k"])

    def changes(unet, before):
        leading = next(leading_names)
        return {
            name: 2.0 if f"attn1.{leading}" in name else 1.0 for name, _ in unet.named_parameters()
        }

    monkeypatch.setattr("loraseg.probes.gradient.relative_changes", changes)
    report = gradient_probe(base, data, probe_config(epochs=3, top=2, stop_overlap=0.9))
    assert report.samples["epochs"] == 3
    assert report.settings["overlaps"] == [0.0, 0.0]


def test_zero_initialised_layers_have_no_score(base, data):
    with torch.no_grad():
        base.unet.conv_out.weight.zero_()
        base.unet.time_embedding.linear_1.weight.mul_(1e-12)
    report = gradient_probe(base, data, probe_config(epochs=1))
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


def test_training_keeps_one_copy_of_the_initial_weights(base, data):
    original = base.unet.conv_in.weight.detach().clone()
    copies = []

    def count(done, loss):
        copies.append(
            sum(
                type(item) is torch.Tensor
                and item is not original
                and item.shape == original.shape
                and torch.equal(item, original)
                for item in gc.get_objects()
            )
        )

    gradient_probe(base, data, probe_config(), on_step=count)
    assert set(copies) == {1}


@pytest.mark.gpu
def test_accelerator_holds_no_second_copy(tmp_path):
    base = tiny_generator()
    data = denoising_data(tmp_path, base, tiny_recipe())
    base.to("cuda")
    devices = []

    def changes(unet, before):
        devices.append({value.device.type for value in before.values()})
        return relative_changes(unet, before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraseg.probes.gradient.relative_changes", changes)
        report = gradient_probe(base, data, probe_config())
    assert devices == [{"cpu"}, {"cpu"}]
    on_cpu = gradient_probe(base.to("cpu"), data, probe_config())
    on_gpu = {score.name: score.score for score in report.scores}
    for score in on_cpu.scores:
        assert on_gpu[score.name] == pytest.approx(score.score, rel=0.2)


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
        probe_config(**changes)


def test_top_is_at_most_the_number_of_projections(base, data):
    with pytest.raises(ConfigError, match=r"top 1000, expected at most \d+"):
        gradient_probe(base, data, probe_config(top=1000))


def test_half_precision_weights_are_refused(base, data):
    with pytest.raises(ConfigError, match=r"UNet is torch\.bfloat16, expected torch\.float32"):
        gradient_probe(base.to("cpu", torch.bfloat16), data, probe_config())
