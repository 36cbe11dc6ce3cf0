"""The pixel term.

Shapes: B batch, C channels, H W pixels.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from sd_vae.errors import UserError

__all__ = ["reconstruction_loss", "require_same_shape"]


def reconstruction_loss(recon: Tensor, x: Tensor, kind: Literal["l2", "l1"]) -> Tensor:
    """Return the mean over B, C, H, W of |recon - x|^2 (l2) or |recon - x| (l1), in fp32.

    Args:
        recon: Reconstructions (B, C, H, W), unclamped.
        x: Images (B, C, H, W) in [-1, 1].
        kind: l2 or l1.

    Raises:
        UserError: Shapes differ.
    """
    require_same_shape(recon, x)
    distance = F.mse_loss if kind == "l2" else F.l1_loss
    return distance(recon.float(), x.float())


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
