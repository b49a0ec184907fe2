"""What Ray Data adds to the data factory: pairs a second against a plain loop, and memory.

The stage that draws is a stand-in of a fixed cost (it waits, then returns noise): what is measured
is the pipeline, from the hand-over of the work to the last outcome, actors' start included.
Planning, voting without a filter and writing shards are the real ones. The loop does the same
stages one after another in this process; Ray has one generator and, beside it, one voter.
"""

import io
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from actors.actor_pools import ActorPoolConfig
from actors.resources import connect
from actors.synthesize import RaySynthesisExecutor
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.filter_stage import FilterStage
from loraseg.batch.synthesize.run import LocalSynthesisExecutor, synthesize
from loraseg.batch.synthesize.state import ResolvedSynthesisModels
from loraseg.data.masks import encode_mask
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import rows_digest
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.vote import FilterConfig
from tests.bench.fixed_stages import FixedCost

SIBLINGS = 5
MASKS, SECONDS = 400, 0.4
FEW, MANY = 2_000, 20_000
FACTS = ResolvedSynthesisModels(base="0" * 64, adapters=(), generator="0" * 64)


class LoopExecutor(LocalSynthesisExecutor):
    """The stages one after another, the first of a fixed cost."""

    def __init__(self, seconds):
        super().__init__()
        self._cost = FixedCost(seconds)

    def look(self, config, label_space):
        return FACTS

    def make(self, pinned, work):
        draw, vote = self._cost(pinned), FilterStage(pinned)
        for part in work:
            yield vote(draw(part))


class RayDataExecutor(RaySynthesisExecutor):
    """The same on Ray Data."""

    def __init__(self, seconds):
        one = ActorPoolConfig(max_parallel=1, cpus=0.5)
        super().__init__(one, one, make_generate_stage=FixedCost(seconds))

    def look(self, config, label_space):
        return FACTS


class TimedExecutor:
    """A crew whose work is timed."""

    def __init__(self, crew):
        self._crew, self.seconds = crew, 0.0
        self.threads, self.device = crew.threads, crew.device
        self.look = crew.look

    def make(self, pinned, work):
        started = time.perf_counter()
        yield from self._crew.make(pinned, work)
        self.seconds += time.perf_counter() - started


def run() -> dict[str, object]:
    """Compare them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        connect(cpus=2)
        loop, loop_rows = pairs_per_second(LoopExecutor(SECONDS), folder / "loop", MASKS)
        stream, stream_rows = pairs_per_second(RayDataExecutor(SECONDS), folder / "stream", MASKS)
        few = peak_memory(folder / "few", FEW)
        many = peak_memory(folder / "many", MANY)
        ray.shutdown()
    return {
        "bench": "synth_overhead",
        "ratios": {
            "ray_vs_loop": round(stream / loop, 4),
            "rss_20k_vs_2k": round(many / few, 4),
        },
        "checks": {"rows_equal": loop_rows == stream_rows},
        "setting": {
            "pairs": MASKS * SIBLINGS,
            "stand_in_s_a_mask": SECONDS,
            "pairs_a_second": {"loop": round(loop, 3), "ray": round(stream, 3)},
            "peak_mb": {str(FEW): round(few / 1e6), str(MANY): round(many / 1e6)},
            "peak_of": "driver and all Ray processes, proportional set size; the drawing stage is "
            "a stand-in without cost",
        },
    }


def make_config(folder, count, side=64):
    """Write masks as Parquet; return the config of a run."""
    masks = folder / "masks"
    masks.mkdir(parents=True)
    random = np.random.default_rng(0)
    cells = random.integers(0, 4, (count, 8, 8), dtype=np.uint8)
    block = np.ones((side // 8, side // 8), np.uint8)
    data = [encode_mask(np.kron(cell, block)) for cell in cells]
    sink = io.BytesIO()
    pq.write_table(pa.table({"mask": data}), sink)
    (masks / "masks.parquet").write_bytes(sink.getvalue())
    return SynthesisConfig(
        masks=str(masks),
        output=str(folder / "out"),
        classes=("road", "sky", "car", "sidewalk"),
        sampling=SamplingConfig(images=SIBLINGS),
        filter=FilterConfig(method="none"),
    )


def pairs_per_second(crew, folder, count):
    """Return pairs a second, and a digest of all rows."""
    timed = TimedExecutor(crew)
    config = make_config(folder, count)
    summary = synthesize(config, timed)
    rows = ShardDataset.open(config.output).rows()
    return summary.manifest.pairs / timed.seconds, rows_digest(rows)


def peak_memory(folder, count):
    """Return the most memory in bytes that a run takes, in the driver and in Ray."""
    watch = MemorySampler()
    with watch:
        config = replace(make_config(folder, count, side=16), masks_per_shard=16)
        synthesize(config, TimedExecutor(RayDataExecutor(0.0)))
    return watch.peak


class MemorySampler:
    """Samples the memory of this process and of all that it started."""

    def __init__(self, every_s=0.5):
        self._every_s, self._stop = every_s, threading.Event()
        self.peak = 0

    def __enter__(self):
        self._thread = threading.Thread(target=self._sample_loop)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _sample_loop(self):
        while not self._stop.wait(self._every_s):
            self.peak = max(self.peak, self._read_bytes())

    @staticmethod
    def _read_bytes():
        own = psutil.Process()
        total = 0
        for process in (own, *own.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total
