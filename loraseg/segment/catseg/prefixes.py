"""The distinct beginnings of a batch of prompts.

Under a causal mask a token's hidden state depends on the tokens up to it and on nothing else, so
prompts that begin alike share these states: each distinct beginning needs them once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraseg.tensor_types import Int

__all__ = ["Prefixes"]


@dataclass(frozen=True, slots=True)
class Prefixes:
    """All n distinct beginnings of t rows, shorter ones first.

    Attributes:
        tokens: Last token of each beginning.
        places: Position of that token.
        rows: The beginnings of each row up to its end token; then 0, which no one attends to.
        homes: Where each beginning stands in the flattened ``rows``.
        ends: The beginning that is the whole row, up to its end token.
        lasts: Position of each row's end token.
    """

    tokens: Int[Tensor, " n"]
    places: Int[Tensor, " n"]
    rows: Int[Tensor, "t l"]
    homes: Int[Tensor, " n"]
    ends: Int[Tensor, " t"]
    lasts: Int[Tensor, " t"]

    @classmethod
    def of(cls, token_ids: Int[Tensor, "t full"]) -> "Prefixes":
        """Find them; a row ends with the first of its largest ids, the rest of it is ignored.

        How many there are decides later shapes: the search runs on the CPU, with one
        synchronisation if the ids are elsewhere.
        """
        token_ids = token_ids.cpu().long()
        lasts = token_ids.argmax(dim=-1)
        total = len(token_ids)
        rows = token_ids.new_zeros(total, int(lasts.max()) + 1)
        parents = lasts.new_zeros(total)
        tokens, places, homes = [], [], []
        count = 0
        for place in range(rows.shape[1]):
            alive = (lasts >= place).nonzero()[:, 0]
            pairs = torch.stack([parents[alive], token_ids[alive, place]])
            distinct, found = pairs.unique(dim=1, return_inverse=True)
            rows[alive, place] = found + count
            parents[alive] = found
            home = alive.new_empty(distinct.shape[1]).scatter_(0, found, alive)
            tokens.append(distinct[1])
            places.append(torch.full_like(home, place))
            homes.append(home * rows.shape[1] + place)
            count += len(home)
        ends = rows[torch.arange(total, device=rows.device), lasts]
        return cls(torch.cat(tokens), torch.cat(places), rows, torch.cat(homes), ends, lasts)

    def to(self, device: torch.device) -> "Prefixes":
        """Return them on a device."""
        parts = (self.tokens, self.places, self.rows, self.homes, self.ends, self.lasts)
        return Prefixes(*(part.to(device) for part in parts))
