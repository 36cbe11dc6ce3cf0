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

FOLDS = {
    **{f"{name} to {family}": (own, family) for name, own in OWN_SCALES.items() for family in ("sd1", "sdxl")},
    "flux to sd3": ({"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}, "sd3"),
    "no quant_conv": ({"scaling_factor": 0.9, "use_quant_conv": False}, "sd1"),
    "no post_quant_conv": ({"scaling_factor": 0.9, "use_post_quant_conv": False}, "sd1"),
}


def folded_vae(vae: AutoencoderKL, family: str) -> AutoencoderKL:
    tensors, config = fold(vae.state_dict(), VAEConfig.from_dict(dict(vae.config)), family)
    folded = AutoencoderKL(**config.to_dict()).to(vae.dtype).eval()
    folded.load_state_dict(tensors)
    return folded


def views(vae: AutoencoderKL, dtype: torch.dtype) -> list[torch.Tensor]:
    """What a pipeline sees of a VAE: mean and std of the latents of fixed pictures, pictures of fixed latents."""
    source = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 16, 16, generator=source).to(dtype) * 2 - 1
    latents = torch.randn(2, vae.config.latent_channels, 8, 8, generator=source).to(dtype)
    scale, shift = latent_scale(VAEConfig.from_dict(dict(vae.config)))
    scale, shift = (torch.tensor(values, dtype=dtype)[:, None, None] for values in (scale, shift))
    posterior = vae.encode(x).latent_dist
    return [(posterior.mean - shift) * scale, posterior.std * scale, vae.decode(latents / scale + shift).sample]


# Of the largest magnitude. Worst seen over 20 seeds: float64 2e-14; float32 4e-7 for mean and std, 9.6e-6 for decodes,
# where a random network amplifies the rounding of its input.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("fields", "family"), FOLDS.values(), ids=FOLDS)
def test_fold_keeps_latents_std_and_decodes(make_vae, fields: dict, family: str, dtype: torch.dtype) -> None:
    vae = make_vae(**fields).to(dtype)

    folded = folded_vae(vae, family)

    assert family_of(VAEConfig.from_dict(dict(folded.config))) == family
    for ours, theirs in zip(views(folded, dtype), views(vae, dtype), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCES[dtype] * float(theirs.abs().max()))


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
