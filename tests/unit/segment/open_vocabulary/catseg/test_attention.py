"""Both implementations of attention give the same result."""

import pytest
import torch

from loraseg.segment.open_vocabulary.catseg.attention import attend


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-14), (torch.bfloat16, 2e-2)])
def test_attention_equals_its_formula_with_and_without_gradients(dtype, atol, masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, 4, 9, 5, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(3)
    )
    mask = torch.zeros(1, 4, 9, 9)
    mask[:, :, :4, 4:] = -100
    mask = mask.to(dtype) if masked else None
    scores = torch.einsum("bhnc,bhmc->bhnm", q.double(), k.double()) / 5**0.5
    weights = (scores + (0 if mask is None else mask.double())).exp()
    expected = (weights / weights.sum(-1, keepdim=True)) @ v.double()
    torch.testing.assert_close(attend(q, k, v, mask).double(), expected, rtol=0, atol=atol)
    q.requires_grad_()
    torch.testing.assert_close(attend(q, k, v, mask).double(), expected, rtol=0, atol=atol)
