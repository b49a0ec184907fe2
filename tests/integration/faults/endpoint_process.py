"""``jobs.serve`` as a process, in front of a library of tiny adapters that tests change."""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import psutil
import yaml
from PIL import Image

from loraseg.adapters import load_adapter, pack, to_peft_files
from loraseg.backbones.clip import load_clip
from loraseg.library import AdapterCard, BaseModelInfo, Centroid, Library
from loraseg.library.retrieve import AdapterRetriever
from loraseg.seeding import numpy_generator
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.storage import open_store
from tests.unit.tiny import CLASSES, DOMAINS, domain_images, random_pairs, write_models

K, TEMPERATURE = 2, 3.0
_START_TIMEOUT_S = 180
_STOP_TIMEOUT_S = 60


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class SampleLibrary:
    """Tiny models, and a library whose centroids are near the embeddings of the images.

    Attributes:
        published: Every published adapter by digest.
    """

    folder: object
    uri: str
    published: dict = field(default_factory=dict)

    def __post_init__(self):
        self.models = write_models(self.folder)
        self.base, self.encoder = load_base(self.models[0]), load_clip(self.models[1])
        self.library = Library(open_store(self.uri))
        self.images = [image for name in DOMAINS for image in domain_images(name, 4)]
        self.embeddings = [self.encoder.encode_images([image])[0] for image in self.images]

    def publish(self, numbers, *, seed=0):
        """Publish adapters in one generation; another seed gives a new version."""
        self.library.publish_all([self._make_adapter(number, seed) for number in numbers])

    def _make_adapter(self, number, seed):
        name, base = f"a{number:03d}", self.base
        pairs = random_pairs(base.model, 1000 * seed + number, size=1.0)
        files = to_peft_files(pairs, base_digest=base.digest)
        adapter = pack(load_adapter(files, name=name))
        self.published[adapter.digest] = adapter
        embedding = self.embeddings[number % len(self.embeddings)].astype(np.float64)
        noise = numpy_generator(number, "centroid").normal(0, 0.05, embedding.shape)
        centroid = Centroid(
            encoder_id=self.encoder.encoder_id,
            normalised=False,
            vector=embedding + noise,
            count=None,
            spread=None,
        )
        card = AdapterCard(
            name=name,
            role="segmenter",
            base=BaseModelInfo(base.name, base.digest),
            label_space=CLASSES,
            centroids=(centroid,),
        )
        return name, files, card

    def nearest_adapters(self):
        """Names of the adapters nearest to the images, the most frequent first."""
        retriever = AdapterRetriever(self.library.entries())
        retrieved = retriever.retrieve_batch(np.stack(self.embeddings), 1, TEMPERATURE)
        return [name for name, _ in Counter(near[0].entry.name for near in retrieved).most_common()]

    @property
    def adapter_bytes(self):
        return max(adapter.nbytes for adapter in self.published.values())


class EndpointProcess:
    """``python -m jobs.serve`` as a process with its own disk cache."""

    def __init__(self, library, folder, environment, **options):
        config = {
            "libraries": {"main": library.uri},
            "base": library.models[0],
            "encoder": library.models[1],
            "k": K,
            "temperature": TEMPERATURE,
            "poll_s": 0.5,
            "gateway": {"cpus": 0},
            "retrieval": {"cpus": 0, "min_replicas": 2, "max_replicas": 2},
            "segmenter": {"cpus": 0, "min_replicas": 2, "max_replicas": 2},
            **options,
        }
        folder.mkdir()
        (folder / "service.yaml").write_text(yaml.safe_dump(config))
        self._config, self._log = folder / "service.yaml", folder / "log.txt"
        cache = {"LORASEG_CACHE": str(folder / "cache")}
        self._environment = {**os.environ, **environment, **cache}

    def __enter__(self):
        command = [sys.executable, "-m", "jobs.serve", "--config", str(self._config), "port=0"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        for line in self._process.stdout:
            if line.startswith("ready: "):
                self.url = line.removeprefix("ready: ").strip()
                return self
            if time.monotonic() > deadline:
                break
        self.__exit__()
        raise AssertionError(f"the endpoint did not start: {self._log.read_text()[-2000:]}")

    def __exit__(self, *_):
        children = self._child_processes()
        self._process.terminate()
        _, remaining = psutil.wait_procs(
            [psutil.Process(self._process.pid), *children], _STOP_TIMEOUT_S
        )
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process.stdout.close()

    def replicas(self, deployment):
        """Return the processes of a deployment's replicas."""
        processes = []
        for process in self._child_processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                title = " ".join(process.cmdline())
                if title.startswith("ray::ServeReplica:") and f":{deployment}" in title:
                    processes.append(process)
        return processes

    def memory_bytes(self):
        """Return the resident memory of all replicas."""
        kinds = ("Gateway", "Retrieval", "Segmenter")
        return sum(p.memory_info().rss for kind in kinds for p in self.replicas(kind))

    def _child_processes(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []
