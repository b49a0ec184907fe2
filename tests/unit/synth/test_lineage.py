import numpy as np

from loraseg.synth.lineage import generator_digest, mask_digest, pair_id


def test_mask_digests_depend_on_ids_and_shape_only():
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    other = mask.copy()
    other[0, 0] = 9
    view = np.repeat(mask, 2, axis=1)[:, ::2]
    assert mask_digest(view) == mask_digest(mask)
    assert len({mask_digest(m) for m in (mask, other, mask.reshape(4, 3), mask.T)}) == 4


def test_pair_ids_depend_on_every_input():
    ids = [
        pair_id("m", 0, "g", 0),
        pair_id("m", 1, "g", 0),
        pair_id("m", 0, "h", 0),
        pair_id("m", 0, "g", 1),
        pair_id("n", 0, "g", 0),
        pair_id("m1", 0, "g", 0),
        pair_id("m", 0, "g", 0, (1.0, 0.0)),
        pair_id("m", 0, "g", 0, (0.0, 1.0)),
    ]
    assert len(set(ids)) == len(ids)
    assert all(len(pair) == 64 for pair in ids)
    # Published ids must not change between versions of the code.
    assert pair_id("m", 0, "g", 0) == (
        "e04d63c77e2ff63f44c857cb54d2b9bb7dd2169dc0649ef3fc936ca4f4aaefe1"
    )


def test_generator_digests_depend_on_the_last_digit():
    parts = {"adapters": [["a", 0.1]], "steps": 50}
    assert generator_digest(parts) == generator_digest(dict(reversed(parts.items())))
    assert generator_digest(parts) != generator_digest({**parts, "adapters": [["a", 0.1 + 2e-17]]})
