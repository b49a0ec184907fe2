"""The distinct beginnings of a batch of prompts.

Under a causal mask a token's hidden state depends on the tokens up to it and on nothing else, so
prompts that begin alike share these states: each distinct beginning needs them once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraseg.tensor_types import Int

__all__ = ["PrefixTable"]


@dataclass(frozen=True, slots=True)
class PrefixTable:
    """All n distinct beginnings of t rows, shorter ones first.

    Attributes:
        tokens: Last token of each beginning.
        positions: Position of that token.
        prefix_ids: The beginnings of each row up to its end token; then 0, which no one attends to.
        flat_indices: Where each beginning stands in the flattened ``prefix_ids``.
        full_prompts: The beginning that is the whole row, up to its end token.
        end_positions: Position of each row's end token.
    """

    tokens: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    prefix_ids: Int[Tensor, "t l"]
    flat_indices: Int[Tensor, " n"]
    full_prompts: Int[Tensor, " t"]
    end_positions: Int[Tensor, " t"]

    @classmethod
    def from_token_ids(cls, token_ids: Int[Tensor, "t full"]) -> "PrefixTable":
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

    def to(self, device: torch.device) -> "PrefixTable":
        """Return them on a device."""
        parts = (
            self.tokens,
            self.positions,
            self.prefix_ids,
            self.flat_indices,
            self.full_prompts,
            self.end_positions,
        )
        return PrefixTable(*(part.to(device) for part in parts))
