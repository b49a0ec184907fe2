"""Reference for the bank: one mix at a time, its low-rank outputs added by forward hooks."""

from contextlib import contextmanager

import torch


@contextmanager
def apply_mix_with_hooks(model, mix):
    """Apply one mix to a model: ``y + (x down^T) up^T`` after every layer."""
    handles = []
    try:
        for name, (down, up) in (mix.pairs() if mix else {}).items():
            handles.append(model.get_submodule(name).register_forward_hook(_make_hook(down, up)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_hook(down, up):
    def hook(module, inputs, output):
        x = inputs[0]
        if len(inputs) == 2:  # a guide, shared along axis 1
            guide = inputs[1].unsqueeze(1).expand(*x.shape[:-1], -1)
            x = torch.cat([x, guide], dim=-1)
        return output + x @ down.to(output).T @ up.to(output).T

    return hook
