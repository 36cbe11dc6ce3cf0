"""Models for the tests of banded execution, and the comparison with the untiled plain path."""

import torch
from torch import Tensor

from sd_vae import PRESETS, AutoencoderKL, ops
from sd_vae.banded.measures import Action, Measure

NARROW = {"block_out_channels": (32, 32, 64, 64)}
TWO_LEVELS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "layers_per_block": 2,
}
ATTENDING = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
CONFIGS: dict[str, dict[str, object]] = {
    **{name: PRESETS[name].to_dict() | NARROW for name in PRESETS},
    "attention in levels": TWO_LEVELS | ATTENDING,
    "no mid attention": TWO_LEVELS | {"mid_block_add_attention": False},
    "no quant convs": TWO_LEVELS | {"use_quant_conv": False, "use_post_quant_conv": False},
    "one level": {"block_out_channels": (32,), "norm_num_groups": 8},
    "narrowing": TWO_LEVELS | {"block_out_channels": (64, 32)},
    "outside the kernels' widths": TWO_LEVELS | {"block_out_channels": (24, 40), "in_channels": 1, "out_channels": 5},
}
"""Name to fields. Widths are multiples of 32, so that the compiled kernels take part, but for the last."""

BOUND = 1e-4  # of the largest magnitude; what the issue asks for in fp32


def make_vae(fields: dict[str, object] = TWO_LEVELS) -> AutoencoderKL:
    """A model in eval mode whose GroupNorm gains are log-normal, harsher than trained ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(**fields).eval()
        for name, weight in vae.named_parameters():
            if "norm" in name and name.endswith("weight"):
                torch.nn.init.normal_(weight.data, std=0.5).exp_()
    return vae


def draw(vae: AutoencoderKL, action: Action, height: int, width: int, batch_size: int = 1, seed: int = 1) -> Tensor:
    """What to encode or decode, height x width latent cells."""
    scale, channels = (vae.factor, vae.config.in_channels) if action == "encode" else (1, vae.config.latent_channels)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, channels, height * scale, width * scale, generator=generator, dtype=vae.dtype)


@torch.no_grad()
def run(vae: AutoencoderKL, action: Action, x: Tensor) -> Tensor:
    """The result as people get it: moments of the posterior, or a picture."""
    if action == "encode":
        return vae.encode(x).latent_dist.parameters
    return vae.decode(x).sample


def plain(vae: AutoencoderKL, action: Action, x: Tensor) -> Tensor:
    """The result without tiling and without any fast version."""
    use_tiling, vae.use_tiling = vae.use_tiling, False
    try:
        with ops.reference():
            return run(vae, action, x)
    finally:
        vae.use_tiling = use_tiling


def in_measure(vae: AutoencoderKL, action: Action, x: Tensor, measure: Measure, *, keep: bool = False) -> Tensor:
    """One half of the network, without the quant convolutions, by a measure."""
    half = vae.encoder if action == "encode" else vae.decoder
    return measure.run(half, action, x, keep_weights=keep, num_groups=vae.config.norm_num_groups)


def plain_half(vae: AutoencoderKL, action: Action, x: Tensor) -> Tensor:
    """One half of the network on the plain path."""
    with torch.no_grad(), ops.reference():
        return vae.encoder(x) if action == "encode" else vae.decoder(x)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, of the largest magnitude."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
