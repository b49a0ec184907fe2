"""What MatchMask++ asks of its jobs. No Ray is started."""

import pytest

import actors.matchmask_pp
from actors.executor import ActorPoolConfig
from actors.matchmask_pp import RayStageRunner
from actors.train_segmenter import WorkerGroupConfig
from loraseg.batch.matchmask_pp.pipeline import PipelineConfig
from loraseg.errors import StageError
from loraseg.synth.vote import FilterConfig


def captured_config(monkeypatch, job, call, **changes):
    """Return the config that a tool hands to ``job``."""
    seen = []

    def note(config, *_):
        seen.append(config)
        raise StageError("enough")

    monkeypatch.setattr(actors.matchmask_pp, job, note)
    monkeypatch.setattr(RayStageRunner, "_check_capacity", lambda *_: None)
    config = PipelineConfig(real="/real", unlabelled="/photos", output="s3://b/out/", **changes)
    with pytest.raises(StageError, match="enough"):
        call(RayStageRunner(config, WorkerGroupConfig(), ActorPoolConfig(), ActorPoolConfig()))
    return seen[0]


def test_places_are_relative_to_the_output(monkeypatch):
    trained = captured_config(
        monkeypatch, "train_segmenters", lambda tools: tools.train("s-1", ["p-0"], "s-0"), images=2
    )
    assert (trained.output, trained.reuse) == ("s3://b/out/s-1", "s3://b/out/s-0")
    assert (trained.synthetic, trained.real) == (("s3://b/out/p-0",), "/real")
    made = captured_config(
        monkeypatch, "synthesize", lambda tools: tools.synthesize("p-1", "m-1", "s/x")
    )
    assert (made.output, made.masks) == ("s3://b/out/p-1", "s3://b/out/m-1")
    assert made.segmenter == "s3://b/out/s/x"


def test_generation_sees_no_label_that_training_does_not(monkeypatch):
    def asked_of(masks, method="relative"):
        return captured_config(
            monkeypatch,
            "synthesize",
            lambda tools: tools.synthesize("p", masks, "s"),
            images=2,
            filter=FilterConfig(method=method),
        )

    real, pseudo = asked_of(None), asked_of("m-1")
    assert (real.masks, real.limit, real.real) == ("/real", 2, None)
    assert (pseudo.masks, pseudo.limit) == ("s3://b/out/m-1", None)
    # FreeMask looks at the labelled images too.
    for masks in (None, "m-1"):
        weighed = asked_of(masks, "freemask")
        assert (weighed.real, weighed.real_images) == ("/real", 2)
