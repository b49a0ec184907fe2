"""Overhead of Ray Data in synthesis: pairs per second against the local executor, and memory.

The generator is a stand-in of a fixed cost (it waits, then returns noise). The time runs from the
start of the executor, actors included, to its last result. Planning, the pass without a filter and
writing shards are real. The local executor runs the stages one after another; Ray has one worker
per stage.
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

from actors.executor import ActorPoolConfig, RayExecutor
from actors.resources import connect
from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.run import synthesize
from loraseg.batch.synthesize.state import ResolvedSynthesisModels
from loraseg.data.masks import encode_mask
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import rows_digest
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.vote import FilterConfig
from tests.bench.fixed_stages import FixedCost
from tests.executors import StageReplacer

SIBLINGS = 5
MASKS, SECONDS = 400, 0.4
FEW, MANY = 2_000, 20_000
MODELS = ResolvedSynthesisModels(base="0" * 64, adapters=(), generator="0" * 64)


class TimedExecutor(StageReplacer):
    """Runs the stages with a generator of a fixed cost and measures the time.

    Attributes:
        seconds: Time of all calls of ``run``.
    """

    def __init__(self, executor, seconds):
        super().__init__(executor, generate=FixedCost(seconds))
        self.call = lambda function, *arguments: MODELS
        self.seconds = 0.0

    def run(self, stages, state, units):
        started = time.perf_counter()
        yield from super().run(stages, state, units)
        self.seconds += time.perf_counter() - started


def ray_executor():
    """Return an executor with one worker per stage."""
    pool = ActorPoolConfig(max_parallel=1, cpus=0.5)
    return RayExecutor(pool, pool)


def run() -> dict[str, object]:
    """Compare both executors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        connect(cpus=2)
        loop, loop_rows = pairs_per_second(LocalExecutor(), folder / "loop")
        stream, stream_rows = pairs_per_second(ray_executor(), folder / "stream")
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
            "peak_of": "driver and all Ray processes, proportional set size; the generator is "
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


def pairs_per_second(executor, folder):
    """Return pairs per second, and a digest of all rows."""
    timed = TimedExecutor(executor, SECONDS)
    config = make_config(folder, MASKS)
    summary = synthesize(config, timed)
    rows = ShardDataset.open(config.output).rows()
    return summary.manifest.pairs / timed.seconds, rows_digest(rows)


def peak_memory(folder, count):
    """Return the peak memory of a run in bytes, driver and Ray together."""
    watch = MemorySampler()
    with watch:
        config = replace(make_config(folder, count, side=16), masks_per_shard=16)
        synthesize(config, TimedExecutor(ray_executor(), 0.0))
    return watch.peak


class MemorySampler:
    """Samples the memory of this process and its descendants."""

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
