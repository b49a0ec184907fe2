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
    """Records its calls; fails once, in the stage ``fails_at``."""

    def __init__(self, fails_at=None):
        self.calls, self._fails_at = [], fails_at

    def _record(self, *call):
        if self._fails_at == call[0].rsplit("-", 1)[0]:
            self._fails_at = None
            raise StageError("killed")
        self.calls.append(call)
        return {"digest": f"of {call[0]}"}  # the output holds the digest of the stage's inputs

    def train(self, output, synthetic, reuse):
        assert (reuse is None) == (not synthetic)
        assert reuse is None or reuse.startswith("o:segmenter-0-")
        result = self._record(output, *synthetic)
        return {**result, "segmenter": f"s:{output}", "output": f"o:{output}"}

    def synthesize(self, output, masks, segmenter):
        return {**self._record(output, masks, segmenter), "dataset": f"d:{output}"}

    def pseudo_masks(self, output, segmenter):
        return {**self._record(output, segmenter), "masks": f"m:{output}"}


DATA = PipelineDataDigests(labelled="l", masks="m", unlabelled="u")


def run(folder, runner, *, rounds=1, settings=None, data=DATA):
    config = PipelineConfig(real="r", unlabelled="u", output=str(folder), rounds=rounds)
    log = StageLog(open_store(str(folder)))
    results = matchmask_pp(config, settings or {"seed": 0}, data, runner, log)
    return [name for name, _ in results]


STAGES = ["segmenter-0", "pairs-0", "segmenter-1", "masks-1", "pairs-1", "segmenter-2"]


def without_digests(call):
    """Remove the digests from the names in a call."""
    return tuple(part and part.rsplit("-", 1)[0] for part in call)


def test_each_stage_takes_the_results_of_earlier_stages(tmp_path):
    runner = FakeStageRunner()
    assert run(tmp_path, runner) == STAGES
    assert [without_digests(call) for call in runner.calls] == [
        ("segmenter-0",),
        ("pairs-0", None, "s:segmenter-0"),
        ("segmenter-1", "d:pairs-0"),
        ("masks-1", "s:segmenter-1"),
        ("pairs-1", "m:masks-1", "s:segmenter-1"),
        ("segmenter-2", "d:pairs-0", "d:pairs-1"),
    ]


def test_completed_stages_are_skipped(tmp_path):
    first = FakeStageRunner(fails_at="masks-1")
    with pytest.raises(StageError, match="killed"):
        run(tmp_path, first)
    again = FakeStageRunner()
    assert run(tmp_path, again) == STAGES
    assert len(first.calls) + len(again.calls) == 6
    third = FakeStageRunner()
    run(tmp_path, third)
    assert third.calls == []
    # Another round continues; other settings run all stages, in other folders.
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
    ("changed", "rerun"),
    [
        ("labelled", STAGES),
        ("masks", ["pairs-0", "segmenter-1", "masks-1", "pairs-1", "segmenter-2"]),
        ("unlabelled", ["masks-1", "pairs-1", "segmenter-2"]),
    ],
)
def test_changed_data_reruns_the_stages_that_depend_on_it(changed, rerun, tmp_path):
    run(tmp_path, FakeStageRunner())
    again = FakeStageRunner()
    assert run(tmp_path, again, data=dataclasses.replace(DATA, **{changed: "other"})) == STAGES
    assert [without_digests(call)[0] for call in again.calls] == rerun


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
    ("file", "changed"),
    [
        ("real/images/train/1.png", {"labelled"}),
        ("real/masks/train/1.png", {"labelled", "masks"}),
        ("real/masks/val/1.png", {"labelled"}),
        ("real/images/train/2.png", set()),  # not one of the two that are used
        ("real/masks/train/2.png", set()),
        ("photos/images/train/1.png", {"unlabelled"}),
        ("photos/images/val/1.png", set()),
    ],
)
def test_digests_depend_on_the_data_that_is_used(file, changed, data):
    before = digests(data, images=2)
    path = data / file
    path.write_bytes(path.with_name("0.png").read_bytes())
    after = digests(data, images=2)
    assert {name for name in before if before[name] != after[name]} == changed
    assert digests(data, images=2) == after


def test_masks_without_an_image_are_in_the_digest_when_all_are_used(data):
    before, few = digests(data), digests(data, images=2)
    masks = data / "real" / "masks" / "train"
    (masks / "z.png").write_bytes((masks / "0.png").read_bytes())
    after = digests(data)
    assert {name for name in before if before[name] != after[name]} == {"masks"}
    assert digests(data, images=2) == few


def test_new_deleted_and_invalid_unlabelled_images_change_the_digest(data):
    folder = data / "photos" / "images" / "train"
    values = [digests(data)["unlabelled"]]
    for change in (
        lambda: (folder / "new.png").write_bytes(b"not an image"),
        lambda: (folder / "back\\slash.png").write_bytes(b"an invalid key"),
        lambda: (folder / "0.png").unlink(),
    ):
        change()
        values.append(digests(data)["unlabelled"])
    assert len(set(values)) == 4


def test_the_entry_of_another_pipeline_is_kept(tmp_path):
    class SlowRunner(FakeStageRunner):
        def train(self, output, synthetic, reuse):
            open_store(str(tmp_path)).put(STAGE_LOG_KEY, b'{"format": 1, "stages": {"x": {}}}')
            return super().train(output, synthetic, reuse)

    run(tmp_path, SlowRunner())  # reads the log again before it writes
    assert "x" in StageLog(open_store(str(tmp_path))).read()[0]


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format": 2, "stages": {}}', b'{"stages": 1}'])
def test_a_damaged_log_is_an_error(data, tmp_path):
    open_store(str(tmp_path)).put(STAGE_LOG_KEY, data)
    with pytest.raises(IntegrityError, match=r"pipeline\.json: damaged"):
        run(tmp_path, FakeStageRunner())


def test_no_rounds_are_an_error():
    with pytest.raises(ConfigError, match="rounds: got 0"):
        PipelineConfig(real="r", unlabelled="u", output="o", rounds=0)
