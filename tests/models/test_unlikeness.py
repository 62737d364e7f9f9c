"""How unlike the training images an image is: scikit-learn's distance, and honest quantiles."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.covariance import LedoitWolf, ledoit_wolf

from cxr_cache.models import unlikeness
from cxr_cache.models.run import Run
from cxr_cache.models.unlikeness import fit_distribution, shrink_covariance


def draw(rng, n: int, width: int = 24) -> np.ndarray:
    mixing = np.random.default_rng(5).normal(size=(width, width))
    return (rng.normal(size=(n, width)) @ mixing + 3).astype(np.float32)


def test_distances_are_scikit_learns():
    rng = np.random.default_rng(0)
    train, new = draw(rng, 300), draw(rng, 7)
    found = fit_distribution(train, rng.integers(0, 5, 300))
    expected = np.sqrt(LedoitWolf().fit(train.astype(np.float64)).mahalanobis(new))
    np.testing.assert_allclose(found.distances(new), expected, rtol=1e-4)


@pytest.mark.parametrize(("n", "width"), [(2, 3), (20, 24), (300, 24), (5000, 7)])
def test_covariances_are_shrunk_as_scikit_learn_shrinks_them(n, width):
    x = draw(np.random.default_rng(n), n, width).astype(np.float64)
    x[:, 1] = 4.0
    mean, covariance = shrink_covariance(x)
    np.testing.assert_allclose(mean, x.mean(axis=0))
    np.testing.assert_allclose(covariance, ledoit_wolf(x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_new_images_of_the_same_kind_have_even_quantiles(seed):
    """With 7 images per dimension, distances of images to their own mean are far too small."""
    rng = np.random.default_rng(seed)
    train, new = draw(rng, 420, 60), draw(rng, 1000, 60)
    found = fit_distribution(train, rng.integers(0, 5, 420))
    quantiles = found.quantiles_of(found.distances(new))
    assert stats.kstest(quantiles, "uniform").statistic < 0.1
    own = np.sort(found.distances(train))
    naive = np.searchsorted(own, found.distances(new)) / len(own)
    assert stats.kstest(naive, "uniform").statistic > 0.15, "what the folds are for"


def test_images_of_another_kind_lie_further_away_than_nearly_all():
    rng = np.random.default_rng(0)
    found = fit_distribution(draw(rng, 300), rng.integers(0, 5, 300))
    quantiles = found.quantiles_of(found.distances(draw(rng, 50) + 25))
    assert (quantiles >= 0.99).all()
    assert found.quantiles_of(np.array([0.0, 1e9, np.nan])).tolist()[:2] == [0.0, 1.0]


def test_what_is_not_finite_has_no_distance():
    rng = np.random.default_rng(0)
    found = fit_distribution(draw(rng, 100), rng.integers(0, 5, 100))
    new = draw(rng, 3)
    new[1, 4] = np.nan
    assert np.isnan(found.distances(new)).tolist() == [False, True, False]
    assert np.isnan(found.quantiles_of(found.distances(new))).tolist() == [False, True, False]


def test_fewer_images_than_dimensions_and_a_column_that_never_varies():
    rng = np.random.default_rng(0)
    train = draw(rng, 20)
    train[:, 3] = 1
    found = fit_distribution(train, np.arange(20) % 4)
    assert np.isfinite(found.distances(draw(rng, 5))).all()
    other = train[:1].copy()
    other[0, 3] = 2
    assert found.distances(other)[0] > found.distances(train[:1])[0]


def test_too_wide_or_too_few_are_not_described(monkeypatch):
    rng = np.random.default_rng(0)
    assert fit_distribution(draw(rng, 40), np.zeros(40, int)) is None
    assert fit_distribution(draw(rng, 3), np.array([0, 0, 1])) is None
    monkeypatch.setattr(unlikeness, "MAX_WIDTH", 23)
    assert fit_distribution(draw(rng, 40), np.arange(40) % 2) is None


def test_of_many_images_some_are_taken(monkeypatch):
    rng = np.random.default_rng(0)
    train, folds = draw(rng, 400), rng.integers(0, 5, 400)
    monkeypatch.setattr(unlikeness, "_MAX_ROWS", 200)
    first, second = (fit_distribution(train, folds, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first.whitening, second.whitening)
    assert not np.array_equal(first.mean, fit_distribution(train, folds, seed=2).mean)


def test_a_run_keeps_it_and_does_without_it(tmp_path):
    run = Run.create(tmp_path / "run", {"kind": "test"})
    assert run.load_distribution() is None, "as runs of earlier versions"
    found = fit_distribution(draw(np.random.default_rng(0), 40), np.arange(40) % 2)
    run.save_distribution(found)
    kept = run.load_distribution()
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(kept, name), value)
    (run.path / "training_distribution.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is damaged.*Delete it to predict without"):
        run.load_distribution()
