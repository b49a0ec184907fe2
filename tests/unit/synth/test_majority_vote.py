"""The vote against a Counter per pixel, a truth table, scipy and invariances."""

from collections import Counter

import numpy as np
import pytest
import scipy.stats

from loraseg.errors import DatasetError
from loraseg.synth import majority_vote as module
from loraseg.synth.majority_vote import ignore_value, majority_vote, relative_filter

CASES = 2000
IGNORED = {np.uint8: 255, np.uint16: 65535}
TIES = ("mask_first", "paper")


def count_votes(votes, mask_id, ties, ignore):
    """Return the prototype of one pixel."""
    counts = Counter(int(vote) for vote in votes)
    most = max(counts.values())
    tied = sorted(vote for vote, count in counts.items() if count == most)
    return mask_id if ties == "mask_first" and mask_id != ignore and mask_id in tied else tied[0]


def loop_filter(mask, labels, ties):
    """Return prototype and filtered labels, computed pixel by pixel."""
    ignore = IGNORED[mask.dtype.type]
    prototype, filtered = np.empty_like(mask), np.empty_like(labels)
    for pixel in np.ndindex(mask.shape):
        votes, mask_id = labels[(slice(None), *pixel)], int(mask[pixel])
        prototype[pixel] = count_votes(votes, mask_id, ties, ignore)
        for k, vote in enumerate(votes):
            filtered[(k, *pixel)] = mask_id if vote == prototype[pixel] else ignore
    return prototype, filtered


def random_votes(random, *, k, classes, dtype, shape=(5, 7)):
    """Return a mask with unlabelled pixels, and maps that agree with it at some pixels."""
    ids = random.choice(classes, size=min(classes, int(random.integers(1, 6))), replace=False)
    mask = random.choice(ids, size=shape).astype(dtype)
    labels = np.repeat(mask[None], k, axis=0)
    noise = random.random(labels.shape) < random.random()
    labels[noise] = random.choice(ids, size=int(noise.sum()))
    mask[random.random(shape) < 0.1] = IGNORED[dtype]
    return mask, labels


def test_random_cases_against_a_counter(monkeypatch):
    random = np.random.default_rng(0)
    seen = Counter()
    for case in range(CASES):
        monkeypatch.setattr(module, "_BLOCK_PIXELS", int(random.integers(9, 50)))
        dtype = (np.uint8, np.uint16)[case % 2]
        k = int(random.integers(2, 10)) if case % 10 else int(random.integers(10, 33))
        classes = int(random.choice([2, 3, 21, 150, 255] + [1000, 65535] * (dtype == np.uint16)))
        mask, labels = random_votes(random, k=k, classes=classes, dtype=dtype)
        results = {}
        for ties in TIES:
            prototype, filtered = loop_filter(mask, labels, ties)
            got = majority_vote(labels, mask=mask, ties=ties)
            assert got.dtype == dtype
            assert (got == prototype).all(), (case, ties)
            assert (relative_filter(mask, labels, ties=ties) == filtered).all(), (case, ties)
            results[ties] = filtered
        seen["ties matter"] += bool((results["paper"] != results["mask_first"]).any())
        seen["unlabelled"] += bool((mask == IGNORED[dtype]).any())
        seen[k] += 1
    # The random cases cover ties, unlabelled pixels and all numbers of voters.
    assert min(seen["ties matter"], seen["unlabelled"]) > CASES / 4
    assert set(range(2, 10)) <= set(seen)
    assert seen[32]


@pytest.mark.parametrize(
    ("votes", "mask_id", "paper", "mask_first", "kept_paper", "kept_mask_first"),
    [
        ([3], 3, 3, 3, "+", "+"),
        ([2], 3, 2, 2, "+", "+"),  # compared with the prototype, not with the mask
        ([2, 2, 2], 3, 2, 2, "+++", "+++"),
        ([3, 3, 2], 3, 3, 3, "++-", "++-"),
        ([2, 2, 3], 3, 2, 2, "++-", "++-"),
        ([2, 3], 3, 2, 3, "+-", "-+"),
        ([3, 2], 2, 2, 2, "-+", "-+"),
        ([2, 3], 9, 2, 2, "+-", "+-"),
        ([1, 2, 2, 3, 3], 3, 2, 3, "-++--", "---++"),
        ([1, 2, 2, 3, 3], 1, 2, 2, "-++--", "-++--"),
        ([0, 1, 2, 3], 2, 0, 2, "+---", "--+-"),
        ([254, 0], 254, 0, 254, "-+", "+-"),
        ([2, 3], 255, 2, 2, "--", "--"),  # unlabelled pixels stay unlabelled
        ([3, 3], 255, 3, 3, "--", "--"),
        ([255, 3], 255, 3, 3, "--", "--"),
        ([255, 255, 3], 3, 255, 255, "++-", "++-"),
    ],
)
def test_truth_table(votes, mask_id, paper, mask_first, kept_paper, kept_mask_first):
    labels = np.array(votes, dtype=np.uint8)[:, None, None]
    mask = np.array([[mask_id]], dtype=np.uint8)
    for ties, winner, kept in zip(
        TIES, (mask_first, paper), (kept_mask_first, kept_paper), strict=True
    ):
        assert majority_vote(labels, mask=mask, ties=ties) == winner
        expected = [mask_id if sign == "+" else 255 for sign in kept]
        assert relative_filter(mask, labels, ties=ties).ravel().tolist() == expected
    assert majority_vote(labels) == paper


@pytest.mark.parametrize(
    ("k", "classes", "dtype"), [(5, 21, np.uint8), (32, 255, np.uint8), (32, 65535, np.uint16)]
)
def test_large_maps_against_scipy(k, classes, dtype):
    random = np.random.default_rng(k)
    # More than one block, the last one incomplete; few of many ids, so that votes agree.
    mask, labels = random_votes(random, k=k, classes=classes, dtype=dtype, shape=(259, 301))
    expected = scipy.stats.mode(labels, axis=0).mode
    assert (majority_vote(labels) == expected).all()
    filtered = np.where(labels == expected, mask, dtype(IGNORED[dtype]))
    assert (relative_filter(mask, labels, ties="paper") == filtered).all()


def test_every_class_id_can_win():
    for dtype, ignore in IGNORED.items():
        ids = np.arange(ignore, dtype=dtype)[None]
        others = np.roll(ids, 1, axis=1)
        assert (majority_vote(np.stack([ids, others, ids])) == ids).all()


def test_invariances():
    random = np.random.default_rng(1)
    mask, labels = random_votes(random, k=7, classes=30, dtype=np.uint8, shape=(40, 50))
    for ties in TIES:
        prototype = majority_vote(labels, mask=mask, ties=ties)
        filtered = relative_filter(mask, labels, ties=ties)
        order = random.permutation(7)
        assert (relative_filter(mask, labels[order], ties=ties) == filtered[order]).all()
        transposed = np.ascontiguousarray(mask.T), labels.transpose(0, 2, 1)
        assert (relative_filter(*transposed, ties=ties) == filtered.transpose(0, 2, 1)).all()
        part = slice(3, 21), slice(2, None, 3)
        assert (
            majority_vote(labels[:, *part], mask=mask[part], ties=ties) == prototype[part]
        ).all()
        doubled = np.concatenate([labels, labels])
        assert (majority_vote(doubled, mask=mask, ties=ties) == prototype).all()
        # Other, wider ids in the same order.
        table = np.append(np.sort(random.choice(5000, size=255, replace=False)), 65535)
        table = table.astype(np.uint16)
        wide = relative_filter(table[mask], table[labels], ties=ties)
        assert (wide == table[filtered]).all()
    # With the paper's tie rule the mask does not affect which pixels are kept.
    other = (mask != 255) * np.uint8(7) + (mask == 255) * np.uint8(255)
    kept = relative_filter(mask, labels, ties="paper") != 255
    assert (kept == (relative_filter(other, labels, ties="paper") != 255)).all()


def test_inputs_are_not_modified_and_may_have_any_memory_order():
    random = np.random.default_rng(2)
    mask, labels = random_votes(random, k=3, classes=4, dtype=np.uint8, shape=(30, 20))
    before = mask.copy(), labels.copy()
    expected = relative_filter(mask, labels)
    strided = np.asfortranarray(mask), np.asfortranarray(labels)
    for array in (mask, labels, *strided):
        array.setflags(write=False)
    assert (relative_filter(*strided) == expected).all()
    assert (relative_filter(mask, labels) == expected).all()
    assert (mask == before[0]).all()
    assert (labels == before[1]).all()
    assert majority_vote(labels).shape == (30, 20)


def test_invalid_inputs_are_refused():
    labels = np.zeros((3, 4, 5), dtype=np.uint8)
    assert not majority_vote(np.zeros((256, 1, 2), dtype=np.uint8)).any()
    with pytest.raises(DatasetError, match=r"votes: got \(257, 1, 2\), expected 1 to 256 maps"):
        majority_vote(np.zeros((257, 1, 2), dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"votes: got \(0, 1, 2\)"):
        majority_vote(np.zeros((0, 1, 2), dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"votes: got \(4, 5\)"):
        majority_vote(labels[0])
    with pytest.raises(DatasetError, match="class ids: got int64, expected uint8 or uint16"):
        majority_vote(labels.astype(np.int64))
    with pytest.raises(DatasetError, match=r"mask of votes: got uint8 \(5, 4\), expected uint8"):
        relative_filter(np.zeros((5, 4), dtype=np.uint8), labels)
    with pytest.raises(DatasetError, match=r"got uint16 \(4, 5\), expected uint8 \(4, 5\)"):
        relative_filter(np.zeros((4, 5), dtype=np.uint16), labels, ties="paper")
    with pytest.raises(DatasetError, match="class ids: got >u2"):
        ignore_value(np.dtype(">u2"))
    assert (ignore_value(np.dtype(np.uint8)), ignore_value(np.dtype(np.uint16))) == (255, 65535)
