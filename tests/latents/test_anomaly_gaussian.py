import pytest
import torch

from sd_vae.errors import UserError
from sd_vae.latents.anomaly.gaussian import Gaussian
from sd_vae.latents.statistics import PictureSums


def correlated(count, size, seed=0):
    """Vectors with a few strong directions and features of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    scales = torch.logspace(-3, 3, size, dtype=torch.float64)
    return (torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing) * scales + 5.0


def test_gaussian_of_many_vectors_gives_the_mahalanobis_distance():
    vectors = torch.randn(20_000, 4, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.5, 0.0, 0.0], [0.0, 1.0, 0.3, 0.0], [0.0, 0.0, 1.0, -0.4], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64
    )

    found = Gaussian.fit(PictureSums.of(vectors)).distance(vectors)

    inverse = torch.linalg.inv(torch.cov(vectors.T))
    centred = vectors - vectors.mean(dim=0)
    expected = torch.einsum("nd,de,ne->n", centred, inverse, centred) / 4
    # shrinkage is what is left; worst seen 1.5e-3 of the value
    torch.testing.assert_close(found.double(), expected, rtol=3e-3, atol=1e-3)


def test_gaussian_does_not_depend_on_units():
    vectors, new = correlated(50, 6), correlated(5, 6, seed=1)
    units = torch.tensor([1.0, 10.0, 0.1, 3.0, 100.0, 0.01], dtype=torch.float64)

    plain = Gaussian.fit(PictureSums.of(vectors)).distance(new)
    scaled = Gaussian.fit(PictureSums.of(vectors * units)).distance(new * units)

    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-5)


def test_gaussian_of_few_vectors_does_not_find_new_ones_far_away():
    vectors, new = correlated(24, 20), correlated(200, 20, seed=1)

    found = Gaussian.fit(PictureSums.of(vectors)).distance(new)

    inverse = torch.linalg.inv(torch.cov(vectors.T))
    centred = new - vectors.mean(dim=0)
    unshrunk = torch.einsum("nd,de,ne->n", centred, inverse, centred) / 20
    # About 1 would be right.
    assert found.mean() < 4 < unshrunk.mean()


def test_gaussian_shrinks_by_pictures_and_not_by_cells():
    vectors = correlated(2000, 5)

    few = Gaussian.fit(PictureSums.of(vectors), num_observations=4)
    many = Gaussian.fit(PictureSums.of(vectors))

    mixed = few.whitener.abs().sum() - few.whitener.diagonal().abs().sum()
    assert mixed * 10 < many.whitener.abs().sum() - many.whitener.diagonal().abs().sum()


def test_gaussian_takes_a_feature_that_never_varies():
    vectors = torch.cat([correlated(30, 2), torch.zeros(30, 1, dtype=torch.float64)], dim=1)

    found = Gaussian.fit(PictureSums.of(vectors))

    assert found.distance(vectors).isfinite().all()


def test_gaussian_of_one_vector_is_refused():
    with pytest.raises(UserError, match="1 normal pictures do not show how normal pictures vary; give at least 2"):
        Gaussian.fit(PictureSums.of(torch.ones(1, 3, dtype=torch.float64)))


def test_gaussian_comes_back_from_its_tensors():
    vectors = correlated(40, 3)
    gaussian = Gaussian.fit(PictureSums.of(vectors))

    again = Gaussian.from_tensors("local", gaussian.to_tensors("local"))

    assert torch.equal(again.distance(vectors), gaussian.distance(vectors))
