"""Starting weights through which the picture passes."""

import pytest
import torch
import torch.nn.functional as F

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.initialization import INITIAL_LOGVAR, start_near_identity_


@pytest.mark.parametrize("use_quant_conv", [True, False])
def test_near_identity_starts_with_a_small_constant_posterior_variance(use_quant_conv: bool) -> None:
    vae = AutoencoderKL.from_preset("mini", use_quant_conv=use_quant_conv, use_post_quant_conv=use_quant_conv).eval()

    start_near_identity_(vae)

    posterior = vae.encode(torch.rand(1, 3, 32, 32)).latent_dist
    torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.logvar, INITIAL_LOGVAR))
    assert posterior.mean.std() > 0.05


def test_near_identity_passes_a_feature_map_through_every_block(tiny_vae: AutoencoderKL) -> None:
    start_near_identity_(tiny_vae)
    x = torch.randn(1, 8, 8, 8)

    level, middle = tiny_vae.encoder.down_blocks[0], tiny_vae.decoder.mid_block
    doubled = tiny_vae.decoder.up_blocks[0].upsamplers[0](torch.randn(1, 16, 4, 4))

    torch.testing.assert_close(level(x), F.avg_pool2d(x, 2))
    h = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(middle(h), h, rtol=0, atol=0)
    torch.testing.assert_close(doubled, F.interpolate(doubled[..., ::2, ::2], scale_factor=2.0), rtol=0, atol=0)
