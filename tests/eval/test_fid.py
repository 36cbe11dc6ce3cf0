import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from eval.fid import PHOTOS, FeatureFile, frechet_distance, frechet_distances
from sd_vae.errors import UserError
from sd_vae.latents.processes import Processes


def features_of(seed, num=600, num_features=12, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.gamma(2.0, 0.2, (num, num_features)) @ rng.normal(size=(num_features, num_features)) + shift).astype(
        "f4"
    )


def filled(features, row="row", pieces=1):
    file = FeatureFile("rfid", row, features.shape[1])
    for piece in np.array_split(features, pieces):
        file.append(piece)
    return file


def theirs(one, other):
    statistics = [fid_features_to_statistics(torch.from_numpy(features.astype("f8"))) for features in (one, other)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize(("num", "num_features"), [(600, 12), (1500, 64), (2048, 300)])
def test_frechet_distance_equals_torch_fidelity_on_equal_features(num, num_features):
    one, other = features_of(0, num, num_features), features_of(1, num, num_features, shift=0.1)

    ours = frechet_distance(filled(one).gaussian(), filled(other).gaussian())

    assert ours == pytest.approx(theirs(one, other), rel=1e-6)  # worst seen 4e-12, seeds 0 to 9


def test_frechet_distance_of_fewer_pictures_than_features_is_torch_fidelitys():
    one, other = features_of(0, 24, 64), features_of(1, 24, 64)

    # the covariances are singular, and their product's eigenvalues of rounding have square roots: worst seen 7e-9
    assert frechet_distance(filled(one).gaussian(), filled(other).gaussian()) == pytest.approx(
        theirs(one, other), rel=1e-6
    )


def test_frechet_distance_of_a_set_to_itself_is_zero():
    gaussian = filled(features_of(0)).gaussian()

    assert frechet_distance(gaussian, gaussian) == pytest.approx(0.0, abs=1e-9)  # worst seen 4e-14, seeds 0 to 9


def test_gaussian_does_not_depend_on_how_features_arrive():
    features = features_of(0, 1300)

    one, other = filled(features).gaussian(), filled(features, pieces=7).gaussian()

    assert (one.mean == other.mean).all()
    assert (one.covariance == other.covariance).all()
    np.testing.assert_allclose(one.covariance, np.cov(features.astype("f8"), rowvar=False), rtol=1e-10)


def test_gathered_features_are_those_of_one_process(monkeypatch):
    features = features_of(0, 1300)
    files = [filled(features[:1100]), filled(features[1100:])]
    barrier, slots = threading.Barrier(2, timeout=30), [None, None]

    def gather(processes, value):
        slots[processes.rank] = value
        barrier.wait()
        values = list(slots)
        barrier.wait()
        return values

    monkeypatch.setattr(Processes, "gather", gather)
    with ThreadPoolExecutor(2) as pool:
        together = [*pool.map(lambda rank: files[rank].gathered(Processes(rank=rank, count=2)), range(2))]

    assert (np.concatenate(list(together[0].blocks())) == features.astype("f8")).all()
    assert len(together[1]) == 0


def test_frechet_distances_compare_every_row_with_the_photos():
    files = [filled(features_of(0), PHOTOS), filled(features_of(0), "same"), filled(features_of(3), "other")]

    found = frechet_distances(files)

    assert found["same"]["rfid"] < 1e-9 < found["other"]["rfid"]
    assert frechet_distances([FeatureFile("rfid", PHOTOS, 4)]) == {}


def test_gaussian_refuses_a_single_picture():
    with pytest.raises(UserError, match="at least 2 photos, there is 1"):
        filled(features_of(0, 1)).gaussian()
