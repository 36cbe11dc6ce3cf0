"""What training did to the latent space: a certificate that it is untouched, or how far it has drifted.

A diffusion model is trained on the latents of one encoder. A VAE whose encoder and quant_conv are bit for bit what they
were decodes the latents of every such model; for any other the drift says what its latents have become.

Shapes: N photos, C latent channels, h w latent cells.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.latents.fingerprint import encoder_fingerprint
from sd_vae.losses import equivariance_errors

__all__ = ["LatentSpace", "described"]

logger = logging.getLogger(__name__)


class LatentSpace:
    """The latent space of a VAE before training, to compare with the one after.

    Args:
        vae: Model; what is needed of it is computed now.
        photos: (N, 3, H, W) in [-1, 1], encoded one at a time.
        device: Where the model is.
        equivariance: Also measure how far it is from equivariance.
    """

    def __init__(self, vae: AutoencoderKL, photos: Tensor, device: torch.device, *, equivariance: bool) -> None:
        self.photos = photos
        self.device = device
        self.fingerprint = encoder_fingerprint(vae)
        self.means = _means(vae, photos, device)
        self.equivariance = equivariance_errors(vae, photos, device) if equivariance else None

    def compare(self, vae: AutoencoderKL) -> dict[str, Any]:
        """Return what a trained VAE's latent space is beside this one, for report and metadata; and log it in words.

        `encoder_sha256` and `encoder`, unchanged or changed. Where it is changed, `drift` has a list over channels of
        `shift`, the mean of the difference of posterior means over the standard deviation before; of `scale`, the
        standard deviation after over that before; and of the `correlation` of both. Where it was asked for,
        `equivariance` before and after.
        """
        fingerprint = encoder_fingerprint(vae)
        result: dict[str, Any] = {"encoder_sha256": fingerprint}
        if fingerprint == self.fingerprint:
            result["encoder"] = "unchanged"
            result["certificate"] = (
                "encoder and quant_conv are bit for bit those of the weights that training started from: "
                "a drop-in for every model trained on their latents"
            )
        else:
            result["encoder"] = "changed"
            result["drift"] = _drift(self.means, _means(vae, self.photos, self.device))
        if self.equivariance is not None:
            after = equivariance_errors(vae, self.photos, self.device)
            result["equivariance"] = {"before": self.equivariance, "after": after}
        logger.info("latents: %s", described(result))
        return result


def described(found: Mapping[str, Any] | None) -> str:
    """Return in words what `LatentSpace.compare` found; None is a VAE that began with random weights."""
    if found is None:
        return "its own, from random weights"
    if "certificate" in found:
        return f"{found['certificate']} (sha256 of both {found['encoder_sha256']})"
    drift = found["drift"]
    channels = "; ".join(
        f"channel {channel}: {shift:+.3f}, {scale:.3f}, {correlation:.4f}"
        for channel, (shift, scale, correlation) in enumerate(
            zip(drift["shift"], drift["scale"], drift["correlation"], strict=True)
        )
    )
    return (
        "drifted from those of the weights before, so train models on them anew (shift in standard deviations, scale, "
        f"correlation; {channels})"
    )


@torch.no_grad()
def _means(vae: AutoencoderKL, photos: Tensor, device: torch.device) -> Tensor:
    """Posterior means by channel, (C, N h w), on the CPU."""
    was_training = vae.training
    vae.eval()
    means = torch.cat([vae.encode(photo.to(device)).latent_dist.mean.double().cpu() for photo in photos.split(1)])
    vae.train(was_training)
    return means.transpose(0, 1).flatten(1)


def _drift(before: Tensor, after: Tensor) -> dict[str, list[float]]:
    """How each channel of `after` lies to that of `before`, (C, N h w) both."""
    std, std_after = before.std(dim=1), after.std(dim=1)
    centred, centred_after = (values - values.mean(dim=1, keepdim=True) for values in (before, after))
    covariance = (centred * centred_after).sum(dim=1) / (before.shape[1] - 1)
    return {
        "shift": ((after - before).mean(dim=1) / std).tolist(),
        "scale": (std_after / std).tolist(),
        "correlation": (covariance / (std * std_after)).tolist(),
    }
