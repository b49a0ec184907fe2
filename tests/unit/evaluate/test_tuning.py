import numpy as np
import pytest

from loraseg.errors import ConfigError
from loraseg.evaluate.tuning import (
    HyperparameterGrid,
    Hyperparameters,
    folds_by_family,
    mixing_weight_matrix,
    select_hyperparameters,
)


def naive_weights(distances, k, temperature):
    """SemLA's retrieval and weights for one image, as in the paper."""
    similarity = [1 / d for d in distances]
    kept = sorted(range(len(distances)), key=lambda i: -similarity[i])[:k]
    total = sum(np.exp(similarity[i] / temperature) for i in kept)
    return [
        np.exp(similarity[i] / temperature) / total if i in kept else 0.0
        for i in range(len(distances))
    ]


@pytest.mark.parametrize("k", [1, 3, 7, 50])
@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
def test_weights_equal_the_formula_row_by_row(k, temperature):
    distances = np.random.default_rng(1).uniform(0.5, 3.0, size=(6, 7))
    weights = mixing_weight_matrix(distances, Hyperparameters(k=k, temperature=temperature))
    naive = [naive_weights(row, k, temperature) for row in distances]
    np.testing.assert_allclose(weights, naive, rtol=0, atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    assert ((weights > 0).sum(axis=1) == min(k, 7)).all()


def test_ties_go_to_the_first_adapter_and_exact_hits_share_the_weight():
    settings = Hyperparameters(k=1, temperature=0.1)
    assert mixing_weight_matrix(np.array([[2.0, 1.0, 1.0]]), settings).tolist() == [[0, 1, 0]]
    hits = mixing_weight_matrix(np.array([[0.0, 1.0, 0.0]]), Hyperparameters(k=3, temperature=0.1))
    assert hits.tolist() == [[0.5, 0, 0.5]]


def test_grid_lists_every_combination_once():
    settings = HyperparameterGrid(k=(1, 5), temperature=(0.1, 0.3, 1.0)).combinations()
    assert len(set(settings)) == len(settings) == 6
    assert settings[0] == Hyperparameters(k=1, temperature=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"k": ()}, "grid.k"), ({"k": (0,)}, "grid.k"), ({"temperature": (0.0,)}, "grid.temperature")],
)
def test_grid_is_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        HyperparameterGrid(**values)


FAMILIES = {
    **{f"fog-{i}": "fog" for i in range(4)},
    **{f"night-{i}": "night" for i in range(3)},
    "snow": "snow",
    "snow-fog": "snow",
    "sketch": "sketch",
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_family_is_in_two_folds(count, seed):
    folds = folds_by_family(FAMILIES, count=count, seed=seed)
    assert list(folds) == list(FAMILIES)
    assert set(folds.values()) == set(range(count))
    for family in set(FAMILIES.values()):
        assert len({folds[d] for d in FAMILIES if FAMILIES[d] == family}) == 1
    if count == 2:
        assert sorted(list(folds.values()).count(fold) for fold in (0, 1)) == [5, 5]


def test_folds_do_not_depend_on_the_order_of_domains():
    reversed_families = dict(reversed(FAMILIES.items()))
    assert folds_by_family(FAMILIES, seed=3) == folds_by_family(reversed_families, seed=3)


def test_folds_need_enough_families():
    with pytest.raises(ConfigError, match="2 for 1 families"):
        folds_by_family({"a": "x", "b": "x"}, count=2)
    with pytest.raises(ConfigError, match="1 for 1 families"):
        folds_by_family({"a": "x", "b": "x"})


def test_by_default_every_family_is_one_fold():
    folds = folds_by_family(FAMILIES)
    pairs = {(FAMILIES[domain], fold) for domain, fold in folds.items()}
    assert len(pairs) == len(set(FAMILIES.values())) == len(set(folds.values()))


SETTINGS = tuple(Hyperparameters(k=k, temperature=0.1) for k in (1, 2, 3))


def test_choice_is_the_best_of_the_other_folds():
    scores = {
        "a": [0.9, 0.1, 0.5],
        "b": [0.8, 0.1, 0.5],
        "c": [0.1, 0.9, 0.5],
        "d": [0.1, 0.8, 0.5],
    }
    folds = {"a": 0, "b": 0, "c": 1, "d": 1}
    chosen = select_hyperparameters(scores, folds, SETTINGS)
    # Every domain gets the best setting of the other fold, which is its own worst.
    assert [chosen[name].k for name in "abcd"] == [2, 2, 1, 1]


def test_choice_does_not_depend_on_the_own_fold():
    rng = np.random.default_rng(0)
    folds = folds_by_family(FAMILIES, count=3, seed=1)
    scores = {name: rng.uniform(0.1, 0.9, size=3).tolist() for name in FAMILIES}
    chosen = select_hyperparameters(scores, folds, SETTINGS)
    for fold in range(3):
        inside = [name for name in FAMILIES if folds[name] == fold]
        for _ in range(20):
            other = {**scores, **{name: rng.uniform(0, 1, size=3).tolist() for name in inside}}
            again = select_hyperparameters(other, folds, SETTINGS)
            assert {name: again[name] for name in inside} == {name: chosen[name] for name in inside}


def test_choice_maximises_the_harmonic_mean():
    # Arithmetic means .55 and .45; harmonic .18 and .45.
    scores = {"a": [1.0, 0.45, 0.4], "b": [0.1, 0.45, 0.4], "c": [0.5, 0.5, 0.5]}
    chosen = select_hyperparameters(scores, {"a": 0, "b": 0, "c": 1}, SETTINGS)
    assert chosen["c"].k == 2
    assert chosen["a"].k == 1  # c scores all settings equally: the first is chosen
