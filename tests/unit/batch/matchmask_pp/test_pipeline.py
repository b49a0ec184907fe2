import dataclasses

import pytest

from loraseg.batch.matchmask_pp.data import data_digests
from loraseg.batch.matchmask_pp.pipeline import (
    STAGE_LOG_KEY,
    PipelineConfig,
    PipelineDataDigests,
    StageLog,
    matchmask_pp,
)
from loraseg.errors import ConfigError, IntegrityError, StageError
from loraseg.storage import open_store
from tests.tiny_training import write_domain


class FakeStageRunner:
    """Notes what it is asked for; fails once at the call that ``fails_at`` names."""

    def __init__(self, fails_at=None):
        self.calls, self._dies = [], fails_at

    def _note(self, *call):
        if self._dies == call[0].rsplit("-", 1)[0]:
            self._dies = None
            raise StageError("killed")
        self.calls.append(call)
        return {"digest": f"of {call[0]}"}  # which carries the digest of the stage's inputs

    def train(self, output, synthetic, reuse):
        assert (reuse is None) == (not synthetic)
        assert reuse is None or reuse.startswith("o:segmenter-0-")
        note = self._note(output, *synthetic)
        return {**note, "segmenter": f"s:{output}", "output": f"o:{output}"}

    def synthesize(self, output, masks, segmenter):
        return {**self._note(output, masks, segmenter), "dataset": f"d:{output}"}

    def pseudo_masks(self, output, segmenter):
        return {**self._note(output, segmenter), "masks": f"m:{output}"}


DATA = PipelineDataDigests(labelled="l", masks="m", unlabelled="u")


def run(folder, tools, *, rounds=1, settings=None, data=DATA):
    config = PipelineConfig(real="r", unlabelled="u", output=str(folder), rounds=rounds)
    ledger = StageLog(open_store(str(folder)))
    told = matchmask_pp(config, settings or {"seed": 0}, data, tools, ledger)
    return [name for name, _ in told]


STAGES = ["segmenter-0", "pairs-0", "segmenter-1", "masks-1", "pairs-1", "segmenter-2"]


def without_digests(call):
    """Return a call without the digests in its names."""
    return tuple(part and part.rsplit("-", 1)[0] for part in call)


def test_each_stage_is_given_what_the_ones_before_made(tmp_path):
    tools = FakeStageRunner()
    assert run(tmp_path, tools) == STAGES
    assert [without_digests(call) for call in tools.calls] == [
        ("segmenter-0",),
        ("pairs-0", None, "s:segmenter-0"),
        ("segmenter-1", "d:pairs-0"),
        ("masks-1", "s:segmenter-1"),
        ("pairs-1", "m:masks-1", "s:segmenter-1"),
        ("segmenter-2", "d:pairs-0", "d:pairs-1"),
    ]


def test_what_is_done_is_skipped(tmp_path):
    first = FakeStageRunner(fails_at="masks-1")
    with pytest.raises(StageError, match="killed"):
        run(tmp_path, first)
    again = FakeStageRunner()
    assert run(tmp_path, again) == STAGES
    assert len(first.calls) + len(again.calls) == 6
    calm = FakeStageRunner()
    run(tmp_path, calm)
    assert calm.calls == []
    # Another round goes on, other settings begin anew and elsewhere.
    more = FakeStageRunner()
    assert run(tmp_path, more, rounds=2) == [*STAGES, "masks-2", "pairs-2", "segmenter-3"]
    assert [without_digests(call)[0] for call in more.calls] == [
        "masks-2",
        "pairs-2",
        "segmenter-3",
    ]
    other = FakeStageRunner()
    run(tmp_path, other, settings={"seed": 1})
    assert len(other.calls) == 6
    assert {call[0] for call in other.calls}.isdisjoint(call[0] for call in first.calls)


@pytest.mark.parametrize(
    ("changed", "anew"),
    [
        ("labelled", STAGES),
        ("masks", ["pairs-0", "segmenter-1", "masks-1", "pairs-1", "segmenter-2"]),
        ("unlabelled", ["masks-1", "pairs-1", "segmenter-2"]),
    ],
)
def test_changed_data_does_anew_what_depends_on_it(changed, anew, tmp_path):
    run(tmp_path, FakeStageRunner())
    again = FakeStageRunner()
    assert run(tmp_path, again, data=dataclasses.replace(DATA, **{changed: "other"})) == STAGES
    assert [without_digests(call)[0] for call in again.calls] == anew


@pytest.fixture
def data(tmp_path):
    write_domain(tmp_path / "real", "fog", side=8)
    write_domain(tmp_path / "photos", "night", side=8)
    return tmp_path


def digests(folder, **changes):
    config = PipelineConfig(
        real=str(folder / "real"), unlabelled=str(folder / "photos"), output="o", **changes
    )
    return dataclasses.asdict(data_digests(config))


@pytest.mark.parametrize(
    ("file", "moved"),
    [
        ("real/images/train/1.png", {"labelled"}),
        ("real/masks/train/1.png", {"labelled", "masks"}),
        ("real/masks/val/1.png", {"labelled"}),
        ("real/images/train/2.png", set()),  # not among the two that are used
        ("real/masks/train/2.png", set()),
        ("photos/images/train/1.png", {"unlabelled"}),
        ("photos/images/val/1.png", set()),
    ],
)
def test_digests_tell_which_data_changed(file, moved, data):
    before = digests(data, images=2)
    path = data / file
    path.write_bytes(path.with_name("0.png").read_bytes())
    after = digests(data, images=2)
    assert {name for name in before if before[name] != after[name]} == moved
    assert digests(data, images=2) == after


def test_masks_without_an_image_count_when_all_are_used(data):
    before, few = digests(data), digests(data, images=2)
    masks = data / "real" / "masks" / "train"
    (masks / "z.png").write_bytes((masks / "0.png").read_bytes())
    after = digests(data)
    assert {name for name in before if before[name] != after[name]} == {"masks"}
    assert digests(data, images=2) == few


def test_new_lost_and_hostile_unlabelled_images_count(data):
    folder = data / "photos" / "images" / "train"
    seen = [digests(data)["unlabelled"]]
    for change in (
        lambda: (folder / "new.png").write_bytes(b"no picture"),
        lambda: (folder / "back\\slash.png").write_bytes(b"no store takes the name"),
        lambda: (folder / "0.png").unlink(),
    ):
        change()
        seen.append(digests(data)["unlabelled"])
    assert len(set(seen)) == 4


def test_two_pipelines_do_not_overwrite_each_other(tmp_path):
    class Late(FakeStageRunner):
        def train(self, place, synthetic, reuse):
            open_store(str(tmp_path)).put(STAGE_LOG_KEY, b'{"format": 1, "stages": {"x": {}}}')
            return super().train(place, synthetic, reuse)

    run(tmp_path, Late())  # it reads the ledger anew before it writes
    assert "x" in StageLog(open_store(str(tmp_path))).read()[0]


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format": 2, "stages": {}}', b'{"stages": 1}'])
def test_a_damaged_ledger_is_refused(data, tmp_path):
    open_store(str(tmp_path)).put(STAGE_LOG_KEY, data)
    with pytest.raises(IntegrityError, match=r"pipeline\.json: damaged"):
        run(tmp_path, FakeStageRunner())


def test_no_rounds_are_no_pipeline():
    with pytest.raises(ConfigError, match="rounds: got 0"):
        PipelineConfig(real="r", unlabelled="u", output="o", rounds=0)
