"""The data factory: masks in, filtered and traceable image/label pairs out (methods b.5).

Why parts: masks are surveyed, sorted by what they are and cut into groups. A group is one unit of
work and becomes one shard, named by what it is made of. Whatever is killed when, the next run cuts
the same groups, keeps the shards that are there and makes the others; readers see nothing of it
before one conditional write of the manifest.

Why a mask's images are one batch of the generator: sums of another batch differ in their last bits,
and one image must be made again, alone, with the same bytes years later.
"""

__all__: list[str] = []
