"""The bank against dense weights in float64, and what it promises about base, slots and shapes."""

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

BESIDE, MERGED = MergeTable(1e9), MergeTable(0.0)
FORMS = pytest.mark.parametrize("batched", [False, True], ids=["in_turn", "batched"])
TABLES = pytest.mark.parametrize("table", [BESIDE, MERGED], ids=["beside", "merged"])


class Guided(nn.Linear):
    """A layer of two inputs, as in CAT-Seg's aggregator."""

    def forward(self, x, guide):
        spread = guide.unsqueeze(1).expand(*x.shape[:-1], -1)
        return nn.functional.linear(torch.cat([x, spread], dim=-1), self.weight, self.bias)


class Small(nn.Module):
    """Plain layers with and without bias and a guided one; images outermost."""

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
    for site, rank in (ranks or dict.fromkeys(shapes, 2)).items():
        d_in, d_out = shapes[site]
        down, up = (
            torch.randn(size, generator=generator, dtype=torch.float64)
            for size in ((rank, d_in), (d_out, rank))
        )
        pairs[site] = LoraPair(down, up * (site not in zero), scale)
    return Adapter(name=name, pairs=pairs, digest=name)


def dense(model, adapters, weights):
    merged = copy.deepcopy(model)
    for one, weight in zip(adapters, weights, strict=True):
        for site, pair in one.pairs.items():
            merged.get_submodule(site).weight.data += weight * pair.scale * (pair.up @ pair.down)
    return merged


RECIPES = [
    ([adapter("x"), adapter("y")], [0.3, 0.7]),
    ([adapter("z", ranks={"a": 1, "c": 3}), adapter("x")], [1.5, -0.5]),
    ([adapter("y")], [1.0]),
    ([adapter(f"n{i}", ranks={"a": 2, "b": 1, "c": 2, "d": 4}) for i in range(5)], [0.2] * 5),
    ([adapter("o", zero=("a", "b", "c", "d"))], [1.0]),
]


@pytest.fixture(params=[2**17, -1], ids=["kept", "scratch"])
def _both_sizes(request, monkeypatch):
    """Merged weights of small layers are kept, those of large ones pass through scratch memory."""
    monkeypatch.setattr("loraseg.fuse.mixed_layer._MAX_CACHED_WEIGHT_SIZE", request.param)


@FORMS
@TABLES
@pytest.mark.usefixtures("_both_sizes")
def test_every_part_has_its_own_weights(model, batched, table):
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
def test_no_mix_leaves_rows_behind_for_the_next(model, batched, table):
    """A stale row would give a plausible, wrong result: all orders of mixes of all layouts."""
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


def test_the_base_comes_back_after_an_exception(model):
    bank, x = AdapterBank(model), torch.ones(1, 1, 1, 4, dtype=torch.float64)
    before = model(x)
    with pytest.raises(RuntimeError, match="inside"), bank.use([fuse(*RECIPES[0])]):
        raise RuntimeError("inside")
    assert torch.equal(model(x), before)
    with bank.use([fuse(*RECIPES[0])]):
        pass


@FORMS
@TABLES
def test_an_image_does_not_depend_on_its_neighbours(model, batched, table):
    x = torch.randn(5, 3, 2, 4, dtype=torch.float64)
    mixes = [fuse(*recipe) for recipe in RECIPES]
    bank = AdapterBank(model, table=table, batched=batched)
    with torch.no_grad():
        with bank.use(mixes):
            together = model(x)
        for index, mix in enumerate(mixes):
            with bank.use([mix]):
                torch.testing.assert_close(model(x[index][None])[0], together[index])


def test_catseg_acts_as_with_hooks():
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


def test_buffers_stay_where_they_are_and_compiled_code_stays_valid(model):
    recordings = []

    def backend(graph, inputs):
        recordings.append(graph)
        return graph.forward

    torch._dynamo.reset()
    bank = AdapterBank(model, batched=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    places = set()
    for number in range(4):
        weights = [0.1 + number / 10, 0.9 - number / 10]
        parts = [adapter(f"m{number}"), adapter(f"k{number}")]
        x = torch.randn(4, 3, 2, 4, dtype=torch.float64)
        with torch.no_grad(), bank.use([fuse(parts, weights), fuse(parts, weights[::-1])]):
            got = compiled(x)
        places.add(bank._buffers[0].view("a")[0].data_ptr())
        for index, order in enumerate((weights, weights[::-1])):
            rows = slice(2 * index, 2 * index + 2)
            expected = dense(model, parts, order)(x[rows])
            torch.testing.assert_close(got[rows], expected, rtol=0, atol=1e-10)
    assert len(recordings) == 1
    assert len(places) == 1


def test_buffers_of_the_usual_size_survive_a_mix_of_all_adapters(model):
    bank = AdapterBank(model)
    for recipe in (RECIPES[0], ([adapter(f"n{i}") for i in range(30)], [1 / 30] * 30), RECIPES[0]):
        with bank.use([fuse(*recipe)]):
            pass
    assert sorted(slots.rank for slots in bank._buffers) == [8, 64]


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ({"q": (4, 6)}, "module 'q': the model has no linear layer"),
        ({"a": (5, 6)}, r"module 'a': got an adapter for a weight \(6, 5\), expected \(6, 4\)"),
        ({"a": (4, 6), "d": (5, 5)}, r"module 'd': got .* \(5, 5\), expected \(4, 5\)"),
    ],
)
def test_refuses_what_does_not_fit_and_adds_nothing(model, pairs, reason):
    ones = {n: LoraPair(torch.ones(1, i), torch.ones(o, 1), 1.0) for n, (i, o) in pairs.items()}
    bank, x = AdapterBank(model), torch.ones(1, 1, 1, 4, dtype=torch.float64)
    before = model(x)
    wrong = fuse([Adapter(name="w", pairs=ones, digest="w")], [1.0])
    with pytest.raises(AdapterMismatchError, match=reason), bank.use([wrong]):
        pass
    assert torch.equal(model(x), before)


def test_refuses_two_uses_at_once_and_inputs_that_do_not_divide(model):
    bank, mix = AdapterBank(model), fuse(*RECIPES[0])
    with bank.use([mix]), pytest.raises(StageError, match="in use"), bank.use([None]):
        pass
    with (
        torch.no_grad(),
        bank.use([mix, None]),
        pytest.raises(StageError, match=r"layer a: got an input of shape \(3, .*expected 2 equal"),
    ):
        model(torch.ones(3, 1, 1, 4, dtype=torch.float64))


def test_two_banks_on_one_model_do_not_take_each_other_away(model):
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


def test_a_failure_while_a_slot_is_filled_leaves_no_rows_behind(model, monkeypatch):
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    bank = AdapterBank(model, table=BESIDE)
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


def test_gradients_are_off_while_a_mix_is_in_use(model):
    model.requires_grad_(True)
    with AdapterBank(model).use([fuse(*RECIPES[0])]):
        assert not model(torch.ones(1, 1, 1, 4, dtype=torch.float64)).requires_grad
    assert torch.is_grad_enabled()


def test_batched_parts_are_as_few_as_are_equal(model):
    bank = AdapterBank(model, batched=True)
    one, two = fuse(*RECIPES[0]), fuse(*RECIPES[1])
    plan, held = bank._plan([one] * 4 + [two] * 2 + [None] * 2)
    assert plan.parts == 4
    assert held == [one, one, two, None]


def test_float32_adapters_serve_a_model_of_another_type(model):
    model.to(torch.bfloat16)
    x = torch.randn(2, 3, 2, 4)
    for table in (BESIDE, MERGED):
        with torch.no_grad(), AdapterBank(model, table=table).use([fuse(*RECIPES[0])]):
            got = model(x.bfloat16())
        expected = dense(copy.deepcopy(model).double(), *RECIPES[0])(x.double())
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=0.2)


def test_adapters_that_change_nothing_cost_nothing(model):
    bank = AdapterBank(model)
    with bank.use([fuse([adapter("o", zero=("a", "b", "c", "d"))], [1.0])]):
        assert all("forward" not in module.__dict__ for module in model.modules())
