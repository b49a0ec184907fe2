"""The bank against dense weights in float64; the base, slots and buffers stay unchanged."""

import copy

import pytest
import torch
from torch import nn

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.errors import AdapterMismatchError, StageError
from loraseg.fuse.bank import AdapterBank
from loraseg.fuse.buffers import AdapterBuffers
from loraseg.fuse.merging import MergeTable
from loraseg.fuse.mix import fuse
from tests.unit.fuse.hook_reference import apply_mix_with_hooks
from tests.unit.tiny import CLASSES, random_adapter, tiny_base

LOW_RANK, MERGED = MergeTable(1e9), MergeTable(0.0)
FORMS = pytest.mark.parametrize("batched", [False, True], ids=["segments", "batched"])
TABLES = pytest.mark.parametrize("table", [LOW_RANK, MERGED], ids=["low_rank", "merged"])


class Guided(nn.Linear):
    """A layer with two inputs, as in CAT-Seg's aggregator."""

    def forward(self, x, guide):
        expanded = guide.unsqueeze(1).expand(*x.shape[:-1], -1)
        return nn.functional.linear(torch.cat([x, expanded], dim=-1), self.weight, self.bias)


class Small(nn.Module):
    """Plain layers with and without bias, and a guided one; the first axis is images."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 6, bias=False)
        self.c = Guided(6 + 3, 5)
        self.d = nn.Linear(5, 4)

    def forward(self, x):
        y = self.b(torch.tanh(self.a(x)))  # (b, s, p, 6)
        return self.d(self.c(y, x[:, 0, :, :3]))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small().double().requires_grad_(False)


def adapter(name, *, ranks=None, scale=0.5, zero=(), seed=None):
    shapes = {"a": (4, 6), "b": (6, 6), "c": (9, 5), "d": (5, 4)}
    generator = torch.Generator().manual_seed(sum(map(ord, name)) if seed is None else seed)
    pairs = {}
    for layer, rank in (ranks or dict.fromkeys(shapes, 2)).items():
        d_in, d_out = shapes[layer]
        down, up = (
            torch.randn(size, generator=generator, dtype=torch.float64)
            for size in ((rank, d_in), (d_out, rank))
        )
        pairs[layer] = LoraPair(down, up * (layer not in zero), scale)
    return Adapter(name=name, pairs=pairs, digest=name)


def dense(model, adapters, weights):
    merged = copy.deepcopy(model)
    for adapter_, weight in zip(adapters, weights, strict=True):
        for layer, pair in adapter_.pairs.items():
            merged.get_submodule(layer).weight.data += weight * pair.scale * (pair.up @ pair.down)
    return merged


RECIPES = [
    ([adapter("x"), adapter("y")], [0.3, 0.7]),
    ([adapter("z", ranks={"a": 1, "c": 3}), adapter("x")], [1.5, -0.5]),
    ([adapter("y")], [1.0]),
    ([adapter(f"n{i}", ranks={"a": 2, "b": 1, "c": 2, "d": 4}) for i in range(5)], [0.2] * 5),
    ([adapter("o", zero=("a", "b", "c", "d"))], [1.0]),
]


@pytest.fixture(params=[2**17, -1], ids=["cached", "scratch"])
def _both_sizes(request, monkeypatch):
    """Merged weights are cached for small layers and built in scratch memory for large ones."""
    monkeypatch.setattr("loraseg.fuse.mixed_layer._MAX_CACHED_WEIGHT_SIZE", request.param)


@FORMS
@TABLES
@pytest.mark.usefixtures("_both_sizes")
def test_every_part_uses_its_own_mix(model, batched, table):
    x = torch.randn(12, 3, 2, 4, dtype=torch.float64)
    mixes = [fuse(*recipe) for recipe in RECIPES]
    bank = AdapterBank(model, table=table, batched=batched)
    with torch.no_grad(), bank.use([*mixes, None]):
        got = model(x)
    for index, recipe in enumerate([*RECIPES, ([], [])]):
        rows = slice(2 * index, 2 * index + 2)
        torch.testing.assert_close(got[rows], dense(model, *recipe)(x[rows]), rtol=0, atol=1e-10)


@FORMS
@TABLES
@pytest.mark.usefixtures("_both_sizes")
def test_no_rows_are_left_for_the_next_mix(model, batched, table):
    """A stale row would give a plausible but wrong result; all pairs of layouts are tried."""
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64)
    bank = AdapterBank(model, table=table, batched=batched)
    for first in RECIPES:
        for second in RECIPES:
            for recipe in (first, second):
                with torch.no_grad(), bank.use([fuse(*recipe)]):
                    got = model(x)
                torch.testing.assert_close(got, dense(model, *recipe)(x), rtol=0, atol=1e-10)


@FORMS
def test_runs_of_one_mix_and_images_of_several_windows(model, batched):
    one, two = fuse(*RECIPES[0]), fuse(*RECIPES[1])
    x = torch.randn(12, 3, 2, 4, dtype=torch.float64)
    for mixes in ([one] * 3 + [two] * 3, [one, one, one, None, two, two], [two] * 6):
        bank = AdapterBank(model, batched=batched)
        with torch.no_grad(), bank.use(mixes):
            got = model(x)
        for index, mix in enumerate(mixes):
            rows = slice(2 * index, 2 * index + 2)
            with apply_mix_with_hooks(model, mix):
                torch.testing.assert_close(got[rows], model(x[rows]), rtol=0, atol=1e-10)


@FORMS
@TABLES
def test_the_base_is_only_read(model, batched, table):
    x = torch.randn(4, 3, 2, 4, dtype=torch.float64)
    before, weights = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    bank = AdapterBank(model, table=table, batched=batched)
    for number in range(50):
        mix = fuse([adapter("x"), adapter("y")], [number / 50, 1 - number / 50])
        with torch.no_grad(), bank.use([mix, None]):
            got = model(x)
        torch.testing.assert_close(got[2:], before[2:], rtol=0, atol=1e-12)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model(x), before)
    with bank.use([None, None]):
        assert torch.equal(model(x), before)


def test_the_base_is_restored_after_an_exception(model):
    bank, x = AdapterBank(model), torch.ones(1, 1, 1, 4, dtype=torch.float64)
    before = model(x)
    with pytest.raises(RuntimeError, match="inside"), bank.use([fuse(*RECIPES[0])]):
        raise RuntimeError("inside")
    assert torch.equal(model(x), before)
    with bank.use([fuse(*RECIPES[0])]):
        pass


@FORMS
@TABLES
def test_an_image_does_not_depend_on_the_rest_of_the_batch(model, batched, table):
    x = torch.randn(5, 3, 2, 4, dtype=torch.float64)
    mixes = [fuse(*recipe) for recipe in RECIPES]
    bank = AdapterBank(model, table=table, batched=batched)
    with torch.no_grad():
        with bank.use(mixes):
            together = model(x)
        for index, mix in enumerate(mixes):
            with bank.use([mix]):
                torch.testing.assert_close(model(x[index][None])[0], together[index])


def test_catseg_equals_the_hook_reference():
    base = tiny_base()
    side = base.model.config.image_size
    mixes = [
        fuse(
            [random_adapter(base, n, s) for s, n in enumerate(names)], [1 / len(names)] * len(names)
        )
        for names in (("a", "b", "c"), ("d",))
    ]
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    tokens = base.tokenize(CLASSES)
    for batched in (False, True):
        bank = AdapterBank(base.model, batched=batched)
        with torch.no_grad(), bank.use(mixes):
            texts = base.encode_tokens(tokens, groups=2)
            got = base.model(images, texts.repeat_interleave(2, dim=0))
        for index, mix in enumerate(mixes):
            rows = slice(2 * index, 2 * index + 2)
            with torch.no_grad(), apply_mix_with_hooks(base.model, mix):
                text = base.encode_tokens(tokens)
                expected = base.model(images[rows], text)
            torch.testing.assert_close(texts[index], text, rtol=0, atol=1e-5)
            torch.testing.assert_close(got[rows], expected, rtol=0, atol=2e-5)


def test_buffers_keep_their_addresses_and_compiled_code_stays_valid(model):
    recordings = []

    def backend(graph, inputs):
        recordings.append(graph)
        return graph.forward

    torch._dynamo.reset()
    bank = AdapterBank(model, batched=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    addresses = set()
    for number in range(4):
        weights = [0.1 + number / 10, 0.9 - number / 10]
        parts = [adapter(f"m{number}"), adapter(f"k{number}")]
        x = torch.randn(4, 3, 2, 4, dtype=torch.float64)
        with torch.no_grad(), bank.use([fuse(parts, weights), fuse(parts, weights[::-1])]):
            got = compiled(x)
        addresses.add(bank._buffers[0].view("a")[0].data_ptr())
        for index, order in enumerate((weights, weights[::-1])):
            rows = slice(2 * index, 2 * index + 2)
            expected = dense(model, parts, order)(x[rows])
            torch.testing.assert_close(got[rows], expected, rtol=0, atol=1e-10)
    assert len(recordings) == 1
    assert len(addresses) == 1


def test_buffers_of_the_usual_rank_survive_a_mix_of_all_adapters(model):
    bank = AdapterBank(model)
    for recipe in (RECIPES[0], ([adapter(f"n{i}") for i in range(30)], [1 / 30] * 30), RECIPES[0]):
        with bank.use([fuse(*recipe)]):
            pass
    assert sorted(buffers.rank for buffers in bank._buffers) == [8, 64]


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ({"q": (4, 6)}, "module 'q': the model has no linear layer"),
        ({"a": (5, 6)}, r"module 'a': got an adapter for a weight \(6, 5\), expected \(6, 4\)"),
        ({"a": (4, 6), "d": (5, 5)}, r"module 'd': got .* \(5, 5\), expected \(4, 5\)"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_change_nothing(model, pairs, reason):
    ones = {n: LoraPair(torch.ones(1, i), torch.ones(o, 1), 1.0) for n, (i, o) in pairs.items()}
    bank, x = AdapterBank(model), torch.ones(1, 1, 1, 4, dtype=torch.float64)
    before = model(x)
    wrong = fuse([Adapter(name="w", pairs=ones, digest="w")], [1.0])
    with pytest.raises(AdapterMismatchError, match=reason), bank.use([wrong]):
        pass
    assert torch.equal(model(x), before)


def test_refuses_nested_use_and_indivisible_inputs(model):
    bank, mix = AdapterBank(model), fuse(*RECIPES[0])
    with bank.use([mix]), pytest.raises(StageError, match="in use"), bank.use([None]):
        pass
    with (
        torch.no_grad(),
        bank.use([mix, None]),
        pytest.raises(StageError, match=r"layer a: got an input of shape \(3, .*expected 2 equal"),
    ):
        model(torch.ones(3, 1, 1, 4, dtype=torch.float64))


def test_two_banks_on_one_model_refuse_simultaneous_use(model):
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    first, second = AdapterBank(model), AdapterBank(model)
    with first.use([fuse(*RECIPES[0])]):
        expected = model(x)
        with pytest.raises(StageError, match="in use"), second.use([fuse(*RECIPES[1])]):
            pass
        assert torch.equal(model(x), expected)
    with second.use([fuse(*RECIPES[1])]):
        got = model(x)
    torch.testing.assert_close(got, dense(model, *RECIPES[1])(x), rtol=0, atol=1e-10)


def test_a_failure_while_filling_a_slot_leaves_no_rows(model, monkeypatch):
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    bank = AdapterBank(model, table=LOW_RANK)
    small = [adapter("s", ranks={"a": 4})], [1.0]
    large = fuse([adapter("x", ranks={"a": 3}), adapter("y", ranks={"a": 3})], [1.0, 1.0])
    with bank.use([fuse(*small)]):
        pass
    write = AdapterBuffers._write

    def fail_after(self, slot, start, one, weight):
        write(self, slot, start, one, weight)
        raise MemoryError("between two adapters")

    with monkeypatch.context() as patch:
        patch.setattr(AdapterBuffers, "_write", fail_after)
        with pytest.raises(MemoryError), bank.use([large]):
            pass
    again = [adapter("t", ranks={"a": 4})], [1.0]
    with bank.use([fuse(*again)]):
        got = model(x)
    torch.testing.assert_close(got, dense(model, *again)(x), rtol=0, atol=1e-10)


def test_gradients_are_disabled_while_a_mix_is_in_use(model):
    model.requires_grad_(True)
    with AdapterBank(model).use([fuse(*RECIPES[0])]):
        assert not model(torch.ones(1, 1, 1, 4, dtype=torch.float64)).requires_grad
    assert torch.is_grad_enabled()


def test_batched_plans_use_the_fewest_equal_parts(model):
    bank = AdapterBank(model, batched=True)
    one, two = fuse(*RECIPES[0]), fuse(*RECIPES[1])
    plan, slots = bank._plan([one] * 4 + [two] * 2 + [None] * 2)
    assert plan.parts == 4
    assert slots == [one, one, two, None]


def test_float32_adapters_work_in_a_model_of_another_dtype(model):
    model.to(torch.bfloat16)
    x = torch.randn(2, 3, 2, 4)
    for table in (LOW_RANK, MERGED):
        with torch.no_grad(), AdapterBank(model, table=table).use([fuse(*RECIPES[0])]):
            got = model(x.bfloat16())
        expected = dense(copy.deepcopy(model).double(), *RECIPES[0])(x.double())
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=0.2)


def test_zero_adapters_attach_to_no_layer(model):
    bank = AdapterBank(model)
    with bank.use([fuse([adapter("o", zero=("a", "b", "c", "d"))], [1.0])]):
        assert all("forward" not in module.__dict__ for module in model.modules())
