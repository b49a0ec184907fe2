"""Data and manifest of four small adapters, and checks of the published ones."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import jobs.train_adapters as job
from loraseg import config as configuration
from loraseg.library import Library
from loraseg.storage import open_store
from tests.tiny_training import write_domain, write_manifest, write_models

STEPS = 60
# The adapters of one domain share frozen work, so one Ray task trains them together.
_KINDS = {
    "fog-small": ("fog", {"targets": "aggregator", "rank": 4}),
    "fog-large": ("fog", {"targets": "aggregator", "rank": 8}),
    "night-small": ("night", {"rank": 4}),
    "night-large": ("night", {"rank": 8}),
}
ADAPTERS = tuple(_KINDS)


@dataclass(frozen=True)
class TrainingInputs:
    """Data and models in ``folder``, shared by all trainings."""

    folder: Path

    def write(self):
        self.folder.mkdir()
        write_models(self.folder)
        for domain in ("fog", "night"):
            write_domain(self.folder / domain, domain)
        return self

    @property
    def models(self):
        return {kind: str(self.folder / f"{kind}.safetensors") for kind in ("base", "encoder")}

    def manifest(self, path, uri):
        """Write a manifest with library and checkpoints below ``uri``; return it and its config."""
        write_manifest(
            path,
            uri,
            {},
            **self.models,
            data_order="per_dataset",
            overrides={"batch_size": 2, "loop": {"steps": STEPS, "checkpoint_every": 10}},
            resources={"retries": 10},
            domains=[
                {"name": name, "data": str(self.folder / domain), "overrides": overrides}
                for name, (domain, overrides) in _KINDS.items()
            ],
        )
        return path, configuration.load(job.Config, path)


def published_digests(uri):
    """Read and verify all adapters; return the sha256 of each file."""
    library = Library(open_store(uri))
    return {
        (entry.name, file): hashlib.sha256(data).hexdigest()
        for entry in library.entries()
        for file, data in library.load_entry(entry)[0].items()
    }


def check_library(uri, expected):
    """Check that each adapter is published once, with the bytes of a run without faults."""
    library = Library(open_store(uri))
    assert {name: len(library.versions(name)) for name in ADAPTERS} == dict.fromkeys(ADAPTERS, 1)
    assert library.generation() == len(ADAPTERS)
    assert published_digests(uri) == expected
    assert library.verify().ok
