"""What MatchMask++ asks of its jobs. No Ray is started."""

import pytest

import actors.pipeline
from actors.pipeline import RayTools
from actors.pools import PoolPlacement
from actors.segmenter_training import Workers
from loraseg.errors import StageError
from loraseg.factory.pipeline import PipelineConfig
from loraseg.synth.vote import FilterConfig


def asked(monkeypatch, job, call, **changes):
    """Return the config that a tool hands to ``job``."""
    seen = []

    def note(config, *_):
        seen.append(config)
        raise StageError("enough")

    monkeypatch.setattr(actors.pipeline, job, note)
    monkeypatch.setattr(RayTools, "_join", lambda *_: None)
    config = PipelineConfig(real="/real", unlabelled="/photos", output="s3://b/out/", **changes)
    with pytest.raises(StageError, match="enough"):
        call(RayTools(config, Workers(), PoolPlacement(), PoolPlacement()))
    return seen[0]


def test_places_are_relative_to_the_output(monkeypatch):
    trained = asked(
        monkeypatch, "train_segmenters", lambda tools: tools.train("s-1", ["p-0"], "s-0"), images=2
    )
    assert (trained.output, trained.reuse) == ("s3://b/out/s-1", "s3://b/out/s-0")
    assert (trained.synthetic, trained.real) == (("s3://b/out/p-0",), "/real")
    made = asked(monkeypatch, "synthesize", lambda tools: tools.synthesize("p-1", "m-1", "s/x"))
    assert (made.output, made.masks) == ("s3://b/out/p-1", "s3://b/out/m-1")
    assert made.segmenter == "s3://b/out/s/x"


def test_generation_sees_no_label_that_training_does_not(monkeypatch):
    def asked_of(masks, method="relative"):
        return asked(
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
