import itertools

import numpy as np
import torch

from loraseg.seeding import derive, numpy_generator, torch_generator


def test_streams_of_different_seeds_or_keys_differ():
    paths = [(), ("a",), ("b",), ("a", "b"), ("ab",), (1,), ("1",), ("a", 1), (1, "a")]
    seeds = {derive(seed, *path) for seed, path in itertools.product((0, 1), paths)}
    assert len(seeds) == 2 * len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_value_is_frozen():
    # Another value would change every reproducible result.
    assert derive(0, "train", "fog-light", 7) == 7271093460259335908


def test_generators_repeat():
    a, b = (numpy_generator(3, "x").random(4) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    c, d = (torch.rand(4, generator=torch_generator(3, "x")) for _ in range(2))
    assert torch.equal(c, d)
