import math

import pytest
import torch

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.errors import AdapterMismatchError


def test_delta_and_count():
    pair = LoraPair(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 0.5)
    assert pair.delta().tolist() == [[1.5, 3.0], [2.0, 4.0]]
    assert Adapter(name="a", pairs={"x": pair, "y": pair}, digest="d").parameter_count() == 8


@pytest.mark.parametrize(
    ("down", "up"),
    [((2, 3), (4, 1)), ((0, 3), (4, 0)), ((2,), (4, 2)), ((2, 3), (4, 2, 1))],
)
def test_refuses_matrices_that_do_not_form_a_pair(down, up):
    with pytest.raises(AdapterMismatchError, match="expected down"):
        LoraPair(torch.ones(down), torch.ones(up), 1.0)


def test_refuses_dtypes_scales_and_empty_adapters():
    with pytest.raises(AdapterMismatchError, match="one floating-point dtype"):
        LoraPair(torch.ones(1, 2), torch.ones(2, 1).double(), 1.0)
    with pytest.raises(AdapterMismatchError, match="one floating-point dtype"):
        LoraPair(torch.ones(1, 2).long(), torch.ones(2, 1).long(), 1.0)
    with pytest.raises(AdapterMismatchError, match="scale nan"):
        LoraPair(torch.ones(1, 2), torch.ones(2, 1), math.nan)
    with pytest.raises(AdapterMismatchError, match="at least one LoRA pair"):
        Adapter(name="a", pairs={}, digest="d")


def test_pairs_are_immutable():
    pair = LoraPair(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    source = {"x": pair}
    adapter = Adapter(name="a", pairs=source, digest="d")
    source["y"] = pair
    assert list(adapter.pairs) == ["x"]
    with pytest.raises(TypeError, match="does not support item assignment"):
        adapter.pairs["y"] = pair
