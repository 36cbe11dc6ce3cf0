"""The digits of benchmarks/augment.py: who is trained on, what the arms add, and what the table says."""

import pytest
import torch

from benchmarks.augment import ARMS, Round, accuracies, load_digits, main, shifted, to_markdown, varied
from sd_vae.autoencoder import AutoencoderKL


@pytest.fixture(scope="module")
def small() -> Round:
    """3 digits of each class in 16x16 pixels, the others for testing."""
    return Round(*load_digits(side=16), num_per_class=3, seed=0)


def test_round_keeps_training_and_testing_apart(small: Round) -> None:
    assert (len(small.x), len(small.test_x)) == (30, 1797 - 30)
    assert small.labels.bincount().tolist() == [3] * 10
    assert not any((small.test_x == one).all(dim=(1, 2, 3)).any() for one in small.x)


def test_rounds_draw_others() -> None:
    x, labels = torch.randn(40, 3, 4, 4), torch.arange(40) % 2

    assert not torch.equal(Round(x, labels, 5, seed=0).x, Round(x, labels, 5, seed=1).x)


def test_shifted_pictures_stay_pictures(small: Round) -> None:
    once, again, other = (shifted(small.x, 0, number) for number in (0, 0, 1))

    assert once.shape == small.x.shape
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert float(once.abs().max()) <= 1.0


def test_through_the_vae_is_the_reconstruction(small: Round, tiny_vae: AutoencoderKL) -> None:
    made = varied(tiny_vae, small, ARMS["through the VAE"], 2)

    with torch.no_grad():
        recon = tiny_vae.decode(tiny_vae.encode(small.x).latent_dist.mode()).sample.clamp(-1, 1)
    torch.testing.assert_close(made, torch.cat([recon, recon]), rtol=0, atol=1e-5)  # batches of other sizes


def test_mixing_changes_pictures(small: Round, tiny_vae: AutoencoderKL) -> None:
    plain, mixed = (varied(tiny_vae, small, ARMS[name], 1) for name in ("through the VAE", "mixing 0.5"))

    assert not torch.allclose(plain, mixed)


def test_classifiers_learn_digits(small: Round) -> None:
    alone = accuracies(small, None)

    assert set(alone) == {"support vectors", "logistic regression"}
    assert min(alone.values()) > 0.6  # 3 digits a class; chance is 0.1
    assert accuracies(small, small.x.repeat(2, 1, 1, 1)).keys() == alone.keys()


def test_table_pairs_rounds() -> None:
    scores = [
        {("none", "s"): 0.5, ("mix", "s"): 0.6},
        {("none", "s"): 0.7, ("mix", "s"): 0.9},
    ]

    table = to_markdown(scores, "title", "note")

    assert "| none | 60.0% |  |" in table
    assert "| mix | 75.0% | +15.0 ±63.5 |" in table  # t of 1 degree of freedom, 12.7, times 5 points


def test_help_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])

    assert "Does augmenting in the latent space help" in capsys.readouterr().out
