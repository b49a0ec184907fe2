"""The order in which training data pass: in rounds, without any state between steps."""

from loraseg.seeding import numpy_generator

__all__ = ["index_at"]


def index_at(position: int, count: int, seed: int, *keys: str | int) -> int:
    """Return which of ``count`` items comes at a position of an endless sequence.

    Every item comes once a round, in an order drawn for that round, so that the answer is a
    function of the arguments alone.
    """
    round_, place = divmod(position, count)
    return int(numpy_generator(seed, *keys, "order", round_).permutation(count)[place])
