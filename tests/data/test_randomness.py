import pytest
import torch

from sd_vae.data.randomness import epoch_permutation, posterior_noise, sample_rng
from sd_vae.errors import UserError


def test_sample_rng_is_a_pure_function_of_its_address():
    first, second = (sample_rng(1, 2, 3, "crop").random(4).tolist() for _ in range(2))

    assert first == second


def test_sample_rng_differs_in_every_part_of_the_address():
    addresses = [(0, 0, 0, "crop"), (1, 0, 0, "crop"), (0, 1, 0, "crop"), (0, 0, 1, "crop"), (0, 0, 0, "posterior")]

    numbers = {sample_rng(*address).random() for address in addresses}

    assert len(numbers) == len(addresses)


def test_sample_rng_keeps_its_numbers():
    # Changing a stream changes every run that is resumed.
    assert sample_rng(0, 1, 2, "crop").integers(0, 10**6, 3).tolist() == [946802, 307565, 96793]


def test_sample_rng_rejects_a_negative_seed():
    with pytest.raises(UserError, match=r"seed is -1, it must be 0 or more"):
        sample_rng(-1, 0, 0, "crop")


def test_epoch_permutation_holds_every_sample_once():
    order = epoch_permutation(0, 5, 101)

    assert sorted(order.tolist()) == list(range(101))


def test_epoch_permutation_differs_between_epochs():
    assert epoch_permutation(0, 0, 101).tolist() != epoch_permutation(0, 1, 101).tolist()


def test_posterior_noise_does_not_depend_on_the_batch_around_it():
    together = posterior_noise(7, torch.tensor([0, 1, 1]), torch.tensor([4, 4, 9]), (4, 2, 2))

    alone = posterior_noise(7, [1], [4], (4, 2, 2))

    assert torch.equal(together[1:2], alone)


def test_posterior_noise_is_standard_normal_fp32():
    eps = posterior_noise(0, [0] * 4, range(4), (4, 64, 64))

    assert eps.shape == (4, 4, 64, 64)
    assert eps.dtype == torch.float32
    # 65,536 numbers: the standard error of both is below 0.004
    assert eps.mean().abs() < 0.015
    assert (eps.std() - 1).abs() < 0.015
