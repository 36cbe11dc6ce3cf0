"""Folding: another scale, the same latents and decodes."""

import pytest
import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints.families import FAMILIES, family_of, fold, latent_scale
from sd_vae.config import PRESETS, VAEConfig
from sd_vae.errors import UserError

OWN_SCALES = {
    "scale": {"scaling_factor": 0.9},
    "shift": {"scaling_factor": 2.5, "shift_factor": -0.4},
    "mean and std": {"latents_mean": (0.1, -2.0, 0.5, 1.0), "latents_std": (0.5, 4.0, 1.0, 2.0)},
}


def folded_vae(vae: AutoencoderKL, family: str) -> AutoencoderKL:
    tensors, config = fold(vae.state_dict(), VAEConfig.from_dict(dict(vae.config)), family)
    folded = AutoencoderKL(**config.to_dict()).eval()
    folded.load_state_dict(tensors)
    return folded


def scaled(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of the latents that a pipeline would see."""
    scale, shift = (
        torch.tensor(values)[:, None, None] for values in latent_scale(VAEConfig.from_dict(dict(vae.config)))
    )
    posterior = vae.encode(x).latent_dist
    return (posterior.mean - shift) * scale, posterior.std * scale


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    scale, shift = (
        torch.tensor(values)[:, None, None] for values in latent_scale(VAEConfig.from_dict(dict(vae.config)))
    )
    return vae.decode(latents / scale + shift).sample


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("own", OWN_SCALES)
def test_fold_keeps_scaled_latents_std_and_decodes(make_vae, own: str, family: str) -> None:
    vae = make_vae(**OWN_SCALES[own])
    x, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)

    folded = folded_vae(vae, family)

    assert family_of(VAEConfig.from_dict(dict(folded.config))) == family
    for ours, theirs in [
        *zip(scaled(folded, x), scaled(vae, x), strict=True),
        (decoded(folded, latents), decoded(vae, latents)),
    ]:
        # worst seen WORST of the largest magnitude
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@torch.no_grad()
def test_fold_moves_a_shift_between_families_of_16_channels(make_vae) -> None:
    vae = make_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    x, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 16, 8, 8)

    folded = folded_vae(vae, "sd3")

    assert (folded.config.scaling_factor, folded.config.shift_factor) == (1.5305, 0.0609)
    for ours, theirs in [
        *zip(scaled(folded, x), scaled(vae, x), strict=True),
        (decoded(folded, latents), decoded(vae, latents)),
    ]:
        # worst seen WORST of the largest magnitude
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("missing", [{"use_quant_conv": False}, {"use_post_quant_conv": False}])
def test_fold_uses_the_next_convolution_where_a_1x1_one_is_missing(make_vae, missing: dict[str, bool]) -> None:
    vae = make_vae(scaling_factor=0.9, **missing)
    x, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)

    folded = folded_vae(vae, "sd1")

    for ours, theirs in [
        *zip(scaled(folded, x), scaled(vae, x), strict=True),
        (decoded(folded, latents), decoded(vae, latents)),
    ]:
        # worst seen WORST of the largest magnitude
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_fold_leaves_its_arguments_alone(make_vae) -> None:
    vae = make_vae(scaling_factor=0.9)
    tensors = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    before = dict(tensors)

    fold(tensors, VAEConfig.from_dict(dict(vae.config)), "sd1")

    assert all(tensors[name] is before[name] for name in before)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in vae.state_dict().items())


def test_fold_of_a_family_to_itself_changes_nothing(vae) -> None:
    tensors = vae.state_dict()

    folded, config = fold(tensors, VAEConfig.from_dict(dict(vae.config)), "sd1")

    assert all(folded[name] is tensors[name] for name in tensors)
    assert config.scaling_factor == 0.18215


def test_fold_refuses_a_shift_without_post_quant_conv(make_vae) -> None:
    vae = make_vae(scaling_factor=0.9, shift_factor=0.5, use_post_quant_conv=False)

    with pytest.raises(UserError, match=r"no post_quant_conv, .*wrong at the border"):
        folded_vae(vae, "sd1")


def test_fold_refuses_an_unknown_family(vae) -> None:
    with pytest.raises(UserError, match=r"unknown model family 'sd9'; choose one of: sd1, sdxl, sd3, flux"):
        folded_vae(vae, "sd9")


def test_fold_refuses_a_family_of_other_channels(vae) -> None:
    with pytest.raises(UserError, match=r"family flux take 16 latent channels, this VAE has 4; .*: sd1, sdxl"):
        folded_vae(vae, "flux")


@pytest.mark.parametrize("name", FAMILIES)
def test_family_of_knows_the_presets(name: str) -> None:
    assert family_of(PRESETS[name]) == name


@pytest.mark.parametrize("own", OWN_SCALES)
def test_family_of_is_none_for_a_scale_of_its_own(own: str) -> None:
    assert family_of(VAEConfig(**OWN_SCALES[own])) is None
