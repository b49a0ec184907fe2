import numpy as np

from loraseg.synth.lineage import generator_digest, mask_digest, pair_id


def test_a_mask_is_known_by_its_ids_and_shape():
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    other = mask.copy()
    other[0, 0] = 9
    view = np.repeat(mask, 2, axis=1)[:, ::2]
    assert mask_digest(view) == mask_digest(mask)
    assert len({mask_digest(one) for one in (mask, other, mask.reshape(4, 3), mask.T)}) == 4


def test_pairs_are_told_apart_by_everything_that_makes_them():
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
    assert all(len(one) == 64 for one in ids)
    # Published names must not change from one version of the code to the next.
    assert pair_id("m", 0, "g", 0) == (
        "e04d63c77e2ff63f44c857cb54d2b9bb7dd2169dc0649ef3fc936ca4f4aaefe1"
    )


def test_generators_are_told_apart_by_their_last_digit():
    one = {"adapters": [["a", 0.1]], "steps": 50}
    assert generator_digest(one) == generator_digest(dict(reversed(one.items())))
    assert generator_digest(one) != generator_digest({**one, "adapters": [["a", 0.1 + 2e-17]]})
