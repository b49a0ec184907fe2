"""What publishing processes do; run as a programme, it publishes until it is killed."""

import concurrent.futures
import sys
import time

import numpy as np

from loraseg.library import AdapterCard, BaseModelInfo, Centroid, Library
from loraseg.storage import open_store


def files_of(name):
    return {
        "adapter_config.json": b'{"r":8}',
        "adapter_model.safetensors": name.encode() * 1000,
    }


def publish(library, name, number):
    vector = np.random.default_rng(number).normal(size=64)
    card = AdapterCard(
        name=name,
        role="segmenter",
        base=BaseModelInfo("miniature", "b" * 64),
        label_space=("road", "car"),
        centroids=(Centroid("clip", False, vector, 3, 0.5),),
    )
    return library.publish(name, files_of(name), card)


def publish_many(uri, process, publishers, count):
    """Let ``publishers`` threads, each with a library of its own, publish ``count`` adapters."""

    def work(thread):
        library = Library(open_store(uri))
        names = [f"p{process}-{thread}-{number}" for number in range(count)]
        for number, name in enumerate(names):
            started = time.perf_counter()
            publish(library, name, number)
            seconds.append(time.perf_counter() - started)
        return names

    seconds: list[float] = []
    with concurrent.futures.ThreadPoolExecutor(publishers) as pool:
        names = [name for names in pool.map(work, range(publishers)) for name in names]
    return names, seconds


if __name__ == "__main__":
    library = Library(open_store(sys.argv[1]))
    for number in range(10_000):
        sys.stdout.write(f"{publish(library, f'{sys.argv[2]}-{number}', number).name}\n")
        sys.stdout.flush()
