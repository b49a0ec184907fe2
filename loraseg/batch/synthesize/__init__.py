"""Generate filtered image/label pairs from masks (MatchMask; FreestyleNet's generator).

The conditions are scanned, sorted by content and cut into units. A unit becomes one shard, named
by its content. A run that follows a kill cuts the same units, keeps the shards that exist and makes
the others; readers see nothing of it before one conditional write of the manifest.

All images of a mask are one batch of the generator: sums in another batch differ in their last
bits, and one image must be reproducible alone with the same bytes.
"""

__all__: list[str] = []
