"""Rectified attention and its mix with plain attention, by loops over heads and tokens."""

import math

import numpy as np
import torch


class ReferenceProcessor:
    """Reference processor of one module of a float64 UNet."""

    def __init__(self, labels, token_classes, *, unconditional, latent, share):
        self.labels = labels  # per sample (H, W)
        self.token_classes = token_classes  # per sample (l,)
        self.unconditional = unconditional
        self.latent = latent
        self.share = share  # hidden states (positions, c) -> (positions,)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        out = [
            self._row(attn, index, hidden, text)
            for index, (hidden, text) in enumerate(
                zip(hidden_states, encoder_hidden_states, strict=True)
            )
        ]
        return attn.to_out[0](torch.from_numpy(np.stack(out)))

    def _row(self, attn, index, hidden, text):
        query, key, value = (
            layer(x).detach().numpy()
            for layer, x in ((attn.to_q, hidden), (attn.to_k, text), (attn.to_v, text))
        )
        positions, tokens = len(query), range(len(key))
        sample = index - self.unconditional
        allowed = [tokens] * positions if sample < 0 else self._allowed(sample, positions)
        share = np.ones(positions) if sample < 0 else self.share(hidden.detach().numpy())
        out = np.zeros_like(query)
        size = query.shape[1] // attn.heads
        for head in range(attn.heads):
            columns = slice(head * size, (head + 1) * size)
            for position in range(positions):
                scores = [
                    float(query[position, columns] @ key[j, columns]) / size**0.5 for j in tokens
                ]
                plain = _attend(scores, tokens, value[:, columns])
                rectified = _attend(scores, allowed[position], value[:, columns])
                out[position, columns] = share[position] * plain + (1 - share[position]) * rectified
        return out

    def _allowed(self, sample, positions):
        """Return, for each position, the tokens of its class and those without a class."""
        height, width = self.latent
        levels = [(math.ceil(height / f), math.ceil(width / f)) for f in (1, 2, 4)]
        rows, columns = next(level for level in levels if math.prod(level) == positions)
        labels, classes = self.labels[sample], self.token_classes[sample]
        allowed = []
        for i in range(rows):
            for j in range(columns):
                label = labels[i * labels.shape[0] // rows][j * labels.shape[1] // columns]
                allowed.append([t for t, c in enumerate(classes) if c in (-1, label)])
        return allowed


def _attend(scores, tokens, value):
    highest = max(scores[j] for j in tokens)
    weights = [math.exp(scores[j] - highest) for j in tokens]
    total = sum(weights)
    return sum(w / total * value[j] for w, j in zip(weights, tokens, strict=True))
