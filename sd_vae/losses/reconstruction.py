"""The pixel term, and the learned scale that it is measured in.

Shapes: B batch, C channels, H W pixels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_vae.errors import UserError

__all__ = ["OutputLogvar", "reconstruction_loss", "require_same_shape"]


def reconstruction_loss(recon: Tensor, x: Tensor, kind: Literal["l2", "l1"]) -> Tensor:
    """Return the mean over B, C, H, W of |recon - x|^2 (l2) or |recon - x| (l1), in fp32 at least.

    Args:
        recon: Reconstructions (B, C, H, W), unclamped.
        x: Images (B, C, H, W) in [-1, 1].
        kind: l2 or l1.

    Raises:
        UserError: Shapes differ.
    """
    require_same_shape(recon, x)
    distance = F.mse_loss if kind == "l2" else F.l1_loss
    dtype = torch.promote_types(recon.dtype, torch.float32)
    return distance(recon.to(dtype), x.to(dtype))


class OutputLogvar(nn.Module):
    """The log-variance s of pixels around the reconstruction, one learned number: exp(-s) * distance + s.

    At its best s is the log of the mean distance, so the weight of the KL term beside it means the same for every
    picture size and every stage of training. Beside `l1` this is the Laplace density's negative log-likelihood for each
    value, beside `l2` twice the normal density's, both up to a constant.

    Source: CompVis/latent-diffusion@main:ldm/modules/losses/contperceptual.py; Rybkin et al., arXiv 2006.13202.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(self, distance: Tensor) -> Tensor:
        """Return the negative log-likelihood per value of a mean distance, a scalar."""
        return distance * torch.exp(-self.logvar) + self.logvar


def require_same_shape(recon: Tensor, x: Tensor) -> None:
    """Check that two batches of images can be compared: PyTorch would stretch one over the other.

    Raises:
        UserError: Shapes differ.
    """
    if recon.shape != x.shape:
        raise UserError(
            f"recon has shape {tuple(recon.shape)} and x {tuple(x.shape)}, they must be equal; "
            "train a VAE whose out_channels equal its in_channels, on images it returns at full size."
        )
