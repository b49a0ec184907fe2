"""Processes that publish to a library or read it, started cheaply from a fork server."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

from loraseg.library import Library
from loraseg.seeding import numpy_generator
from loraseg.storage import open_store
from tests.integration.library.publishers import files_of, publish

# Imports torch once: on two cores the imports of all processes would take a minute.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])

_WRITES = ("put", "put_if_absent", "put_if_match")
_READS = ("get", "get_with_etag", "exists", "list")


@dataclasses.dataclass(frozen=True)
class PublisherEnvironment:
    """What the processes of a test share: a library, its server, and a folder for reports."""

    uri: str
    environment: dict[str, str]
    folder: Path
    seed: int = 0

    def start(self, work, name, *arguments):
        """Start ``work(self, name, *arguments)`` as a process of that name."""
        process = _FORKS.Process(target=_run, args=(work, self, name, *arguments), name=name)
        process.start()
        return process

    def via_proxy(self, url):
        """Return the same environment with another address of the server."""
        environment = {**self.environment, "AWS_ENDPOINT_URL": url}
        return dataclasses.replace(self, environment=environment)

    def report(self, name, **values):
        path = self.folder / f"{name}.json"
        path.with_suffix(".part").write_text(json.dumps(values))
        path.with_suffix(".part").replace(path)

    def reports(self, prefix):
        return [
            json.loads(path.read_text()) for path in sorted(self.folder.glob(f"{prefix}*.json"))
        ]

    @property
    def finished(self):
        """The file that signals to readers that all adapters are published."""
        return self.folder / "finished"


class CrashingStore:
    """Counts the calls of a store; kills its process before or after write number ``kill_at``."""

    def __init__(self, store, kill_at=None, before=False):
        self._store, self._kill_at, self._before = store, kill_at, before
        self._writes = 0
        self.counts = Counter()
        store._client.meta.events.register("before-send.s3", self._count_request)

    def __getattr__(self, name):
        method = getattr(self._store, name)
        if name not in (*_WRITES, *_READS):
            return method
        return lambda *arguments: self._wrap(name, method, *arguments)

    def _wrap(self, name, method, *arguments):
        if name in _WRITES:
            self._writes += 1
            self._maybe_crash(before=True)
        result = method(*arguments)
        if name in _WRITES:
            self._maybe_crash(before=False)
        key = arguments[0] if arguments else ""
        kind = "HEAD" if key.endswith("HEAD") else key.partition("/")[0]
        failed = " refused" if result is False and name in _WRITES else ""
        self.counts[f"{name} {kind}{failed}"] += 1
        return result

    def _maybe_crash(self, *, before):
        if self._writes == self._kill_at and self._before is before:
            os.kill(os.getpid(), signal.SIGKILL)

    def _count_request(self, request, **_):
        self.counts["requests"] += 1


def publish_many(environment, name, count, kill_at=None, before=False):
    """Publish ``count`` adapters one by one; published ones are kept."""
    store = CrashingStore(open_store(environment.uri), kill_at, before)
    library = Library(store)
    seconds = []
    for number in range(count):
        started = time.perf_counter()
        publish(library, adapter_name(name, number), number)
        seconds.append(time.perf_counter() - started)
    environment.report(name, seconds=seconds, cpu_s=time.process_time(), counts=store.counts)


def adapter_name(publisher, number):
    return f"{publisher}-{number:02d}"


def read_until_finished(environment, name):
    """List and load adapters until all are published.

    Generations must increase and keep all entries. In each generation the new adapters and one
    known adapter are loaded and compared.
    """
    library = Library(open_store(environment.uri))
    random = numpy_generator(environment.seed, name)
    last, known, generations, loaded = -1, {}, 0, 0
    while True:
        finished = environment.finished.exists()
        generation = library.generation()
        assert generation >= last, f"generation {generation} after {last}"
        if generation > last:
            entries = {entry.name: entry for entry in library.entries(generation)}
            assert known.items() <= entries.items(), f"generation {generation} lost an entry"
            new = [entry for key, entry in entries.items() if key not in known]
            old = [known[key] for key in random.permutation(sorted(known))[:1]]
            for entry in (*new, *old):
                assert library.load_entry(entry)[0] == files_of(entry.name), entry.name
            last, known = generation, entries
            generations, loaded = generations + 1, loaded + len(new) + len(old)
        elif finished:
            break
        else:
            time.sleep(0.05)
    environment.report(name, generations=generations, loaded=loaded, last=last, entries=len(known))


def _run(work, environment, name, *arguments):
    os.environ.update(environment.environment)
    with contextlib.suppress(KeyboardInterrupt):
        work(environment, name, *arguments)
