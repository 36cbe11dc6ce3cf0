"""The part of a training step that Accelerate wraps, so that gradients are synchronised and autocast applies.

diffusers' `forward` returns only the picture, which tempts trainers to call `encode` and `decode` on the unwrapped
model; several devices then train apart from each other, silently. Here everything that needs a gradient is in one
`forward`.
"""

from torch import Tensor, nn

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.posterior import DiagonalGaussian

__all__ = ["TrainingForward"]


class TrainingForward(nn.Module):
    """x and posterior noise to reconstruction and posterior, in one differentiable call."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Return the reconstruction of a posterior sample, and the posterior.

        Args:
            x: Images (B, 3, H, W) in [-1, 1].
            noise: eps ~ N(0, I), (B, C, h, w); an argument, so that a step is a function of its inputs.

        Returns:
            recon (B, 3, H, W), not clamped, and the posterior with fp32 moments also under autocast.
        """
        (posterior,) = self.vae.encode(x, return_dict=False)
        posterior = DiagonalGaussian(posterior.parameters.float())
        (recon,) = self.vae.decode(posterior.sample(noise=noise), return_dict=False)
        return recon, posterior
