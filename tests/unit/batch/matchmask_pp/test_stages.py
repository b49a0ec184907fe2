"""The configs that the stages of MatchMask++ pass to their jobs."""

import pytest

from loraseg.batch.matchmask_pp import stages
from loraseg.batch.matchmask_pp.pipeline import PipelineConfig
from loraseg.errors import StageError
from loraseg.synth.vote import FilterConfig
from tests.executors import UnusedExecutor


def captured_config(monkeypatch, job, call, **changes):
    """Return the config that a stage passes to ``job``."""
    configs = []

    def capture(config, *_):
        configs.append(config)
        raise StageError("captured")

    monkeypatch.setattr(stages, job, capture)
    config = PipelineConfig(real="/real", unlabelled="/photos", output="s3://b/out/", **changes)
    executor = UnusedExecutor()
    pipeline = stages.PipelineStages(config, lambda task: None, executor, executor)
    with pytest.raises(StageError, match="captured"):
        call(pipeline)
    return configs[0]


def test_paths_are_relative_to_the_output(monkeypatch):
    training = captured_config(
        monkeypatch, "train_segmenters", lambda runner: runner.train("s-1", ["p-0"], "s-0")
    )
    assert (training.output, training.reuse) == ("s3://b/out/s-1", "s3://b/out/s-0")
    assert (training.synthetic, training.real) == (("s3://b/out/p-0",), "/real")
    synthesis = captured_config(
        monkeypatch, "synthesize", lambda runner: runner.synthesize("p-1", "m-1", "s/x")
    )
    assert (synthesis.output, synthesis.masks) == ("s3://b/out/p-1", "s3://b/out/m-1")
    assert synthesis.segmenter == "s3://b/out/s/x"
    pseudo_masks = captured_config(
        monkeypatch, "write_pseudo_masks", lambda runner: runner.pseudo_masks("m-1", "s/x")
    )
    assert (pseudo_masks.output, pseudo_masks.images) == ("s3://b/out/m-1", "/photos")
    assert pseudo_masks.segmenter == "s3://b/out/s/x"


def test_synthesis_sees_the_same_labels_as_training(monkeypatch):
    def config_for(masks, method="relative"):
        return captured_config(
            monkeypatch,
            "synthesize",
            lambda runner: runner.synthesize("p", masks, "s"),
            images=2,
            filter=FilterConfig(method=method),
        )

    real, pseudo = config_for(None), config_for("m-1")
    assert (real.masks, real.limit, real.real) == ("/real", 2, None)
    assert (pseudo.masks, pseudo.limit) == ("s3://b/out/m-1", None)
    # FreeMask uses the labelled images too.
    for masks in (None, "m-1"):
        freemask = config_for(masks, "freemask")
        assert (freemask.real, freemask.real_images) == ("/real", 2)
