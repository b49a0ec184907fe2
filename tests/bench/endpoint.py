"""The endpoint: HTTP against the bare engine, under load, and against SemLA's official code."""

import tempfile
from pathlib import Path

from tests.bench import endpoint_http, endpoint_official
from tests.bench.harness import Times, setting, single_thread


def run() -> dict[str, object]:
    with single_thread(), tempfile.TemporaryDirectory() as folder:
        http = endpoint_http.measure(Path(folder))
        official = endpoint_official.measure(Path(folder))
    times: Times = {**http.times, **official.times}
    return {
        "bench": "endpoint",
        "ratios": {**official.ratios, **http.ratios},
        "checks": {**official.checks, **http.checks},
        "setting": setting(times, **http.setting, **official.setting),
    }
