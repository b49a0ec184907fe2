"""The endpoint: over HTTP against the bare engine, by load, and against the official procedure."""

import tempfile
from pathlib import Path

from tests.bench import endpoint_http, endpoint_official
from tests.bench.harness import Times, setting, single_thread


def run() -> dict[str, object]:
    with single_thread(), tempfile.TemporaryDirectory() as place:
        http = endpoint_http.measure(Path(place))
        official = endpoint_official.measure(Path(place))
    times: Times = {**http.times, **official.times}
    return {
        "bench": "endpoint",
        "ratios": {**official.ratios, **http.ratios},
        "checks": {**official.checks, **http.checks},
        "setting": setting(times, **http.setting, **official.setting),
    }
