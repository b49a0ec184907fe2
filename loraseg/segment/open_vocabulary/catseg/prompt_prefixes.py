"""The distinct prefixes of a batch of prompts.

Under a causal mask the hidden state of a token depends only on the tokens up to it. Prompts with a
common prefix therefore share its states, and each distinct prefix is computed once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraseg.tensor_types import Int

__all__ = ["PrefixTable"]


@dataclass(frozen=True, slots=True)
class PrefixTable:
    """The n distinct prefixes of t rows, shorter ones first.

    Attributes:
        tokens: Last token of each prefix.
        positions: Position of that token.
        prefix_ids: Ids of the prefixes of each row up to its end token, then 0 (never attended to).
        flat_indices: An index of each prefix in the flattened ``prefix_ids``.
        full_prompts: Id of the prefix that is the complete row, up to its end token.
        end_positions: Position of the end token of each row.
    """

    tokens: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    prefix_ids: Int[Tensor, "t l"]
    flat_indices: Int[Tensor, " n"]
    full_prompts: Int[Tensor, " t"]
    end_positions: Int[Tensor, " t"]

    @classmethod
    def from_token_ids(cls, token_ids: Int[Tensor, "t full"]) -> "PrefixTable":
        """Build the table; a row ends at the first occurrence of its largest id.

        The number of prefixes determines later shapes, so the search runs on the CPU; ids on
        another device need one synchronisation.
        """
        token_ids = token_ids.cpu().long()
        end_positions = token_ids.argmax(dim=-1)
        total = len(token_ids)
        prefix_ids = token_ids.new_zeros(total, int(end_positions.max()) + 1)
        parents = end_positions.new_zeros(total)
        tokens, positions, flat_indices = [], [], []
        count = 0
        for position in range(prefix_ids.shape[1]):
            rows = (end_positions >= position).nonzero()[:, 0]
            pairs = torch.stack([parents[rows], token_ids[rows, position]])
            distinct, inverse = pairs.unique(dim=1, return_inverse=True)
            prefix_ids[rows, position] = inverse + count
            parents[rows] = inverse
            example_rows = rows.new_empty(distinct.shape[1]).scatter_(0, inverse, rows)
            tokens.append(distinct[1])
            positions.append(torch.full_like(example_rows, position))
            flat_indices.append(example_rows * prefix_ids.shape[1] + position)
            count += len(example_rows)
        row_numbers = torch.arange(total, device=prefix_ids.device)
        return cls(
            tokens=torch.cat(tokens),
            positions=torch.cat(positions),
            prefix_ids=prefix_ids,
            flat_indices=torch.cat(flat_indices),
            full_prompts=prefix_ids[row_numbers, end_positions],
            end_positions=end_positions,
        )

    def to(self, device: torch.device) -> "PrefixTable":
        """Return the table on a device."""
        tensors = (
            self.tokens,
            self.positions,
            self.prefix_ids,
            self.flat_indices,
            self.full_prompts,
            self.end_positions,
        )
        return PrefixTable(*(tensor.to(device) for tensor in tensors))
