"""The one table between diffusers' tensor names and CompVis' (LDM), built from a config.

Both namings describe the same network; they differ in words, in the order of the decoder's levels and in the shape of
the attention projections, which are 1x1 convolutions in LDM and linear layers in diffusers. Everything that reads,
writes or checks a checkpoint takes names and shapes from here.

Source: CompVis/latent-diffusion@main:ldm/modules/diffusionmodules/model.py for the LDM names; the deprecated names are
those of diffusers before 0.17.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sd_vae.config import VAEConfig

__all__ = ["Key", "key_table"]

_DEPRECATED = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@dataclass(frozen=True)
class Key:
    """One tensor under each of its names."""

    diffusers: str
    """Name in diffusers, and in `sd_vae.AutoencoderKL`."""
    ldm: str
    """Name in CompVis' code, without `first_stage_model.`."""
    shape: tuple[int, ...]
    """Shape in diffusers."""

    @property
    def deprecated(self) -> str:
        """Name in diffusers before 0.17; differs for attention projections only."""
        for current, old in _DEPRECATED.items():
            if ".attentions." in self.diffusers and current in self.diffusers:
                return self.diffusers.replace(current, old)
        return self.diffusers

    @property
    def ldm_shape(self) -> tuple[int, ...]:
        """Shape in LDM: attention projections are 1x1 convolutions there."""
        return (*self.shape, 1, 1) if len(self.shape) == 2 else self.shape

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a stored tensor of this shape is this one, be it stored as linear layer or convolution."""
        return shape == self.shape or (len(self.shape) == 2 and shape in ((*self.shape, 1), (*self.shape, 1, 1)))


def key_table(config: VAEConfig) -> tuple[Key, ...]:
    """Return every tensor of the network that a config describes; no name occurs twice in any naming."""
    return (*_encoder(config), *_decoder(config), *_latent_convolutions(config))


def _encoder(config: VAEConfig) -> Iterator[Key]:
    widths = config.block_out_channels
    yield from _layer("encoder.conv_in", "encoder.conv_in", (widths[0], config.in_channels, 3, 3))
    width = widths[0]
    for level, kind in enumerate(config.down_block_types):
        names = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        yield from _level(*names, width, widths[level], config.layers_per_block, attend=kind.startswith("Attn"))
        width = widths[level]
        if level < len(widths) - 1:
            yield from _layer(f"{names[0]}.downsamplers.0.conv", f"{names[1]}.downsample.conv", (width, width, 3, 3))
    yield from _middle("encoder", width, attend=config.mid_block_add_attention)
    yield from _outlet("encoder", width, 2 * config.latent_channels)


def _decoder(config: VAEConfig) -> Iterator[Key]:
    widths = config.block_out_channels[::-1]
    yield from _layer("decoder.conv_in", "decoder.conv_in", (widths[0], config.latent_channels, 3, 3))
    yield from _middle("decoder", widths[0], attend=config.mid_block_add_attention)
    width = widths[0]
    for level, kind in enumerate(config.up_block_types):
        # LDM counts the decoder's levels from full size, diffusers from the latent.
        names = f"decoder.up_blocks.{level}", f"decoder.up.{len(widths) - 1 - level}"
        yield from _level(*names, width, widths[level], config.layers_per_block + 1, attend=kind.startswith("Attn"))
        width = widths[level]
        if level < len(widths) - 1:
            yield from _layer(f"{names[0]}.upsamplers.0.conv", f"{names[1]}.upsample.conv", (width, width, 3, 3))
    yield from _outlet("decoder", width, config.out_channels)


def _latent_convolutions(config: VAEConfig) -> Iterator[Key]:
    channels = config.latent_channels
    if config.use_quant_conv:
        yield from _layer("quant_conv", "quant_conv", (2 * channels, 2 * channels, 1, 1))
    if config.use_post_quant_conv:
        yield from _layer("post_quant_conv", "post_quant_conv", (channels, channels, 1, 1))


def _middle(half: str, width: int, *, attend: bool) -> Iterator[Key]:
    for index in range(2):
        yield from _resnet(f"{half}.mid_block.resnets.{index}", f"{half}.mid.block_{index + 1}", width, width)
    if attend:
        yield from _attention(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", width)


def _outlet(half: str, width: int, num_out: int) -> Iterator[Key]:
    yield from _layer(f"{half}.conv_norm_out", f"{half}.norm_out", (width,))
    yield from _layer(f"{half}.conv_out", f"{half}.conv_out", (num_out, width, 3, 3))


def _level(diffusers: str, ldm: str, num_in: int, num_out: int, num_layers: int, *, attend: bool) -> Iterator[Key]:
    for layer in range(num_layers):
        yield from _resnet(
            f"{diffusers}.resnets.{layer}", f"{ldm}.block.{layer}", num_out if layer else num_in, num_out
        )
        if attend:
            yield from _attention(f"{diffusers}.attentions.{layer}", f"{ldm}.attn.{layer}", num_out)


def _resnet(diffusers: str, ldm: str, num_in: int, num_out: int) -> Iterator[Key]:
    yield from _layer(f"{diffusers}.norm1", f"{ldm}.norm1", (num_in,))
    yield from _layer(f"{diffusers}.conv1", f"{ldm}.conv1", (num_out, num_in, 3, 3))
    yield from _layer(f"{diffusers}.norm2", f"{ldm}.norm2", (num_out,))
    yield from _layer(f"{diffusers}.conv2", f"{ldm}.conv2", (num_out, num_out, 3, 3))
    if num_in != num_out:
        yield from _layer(f"{diffusers}.conv_shortcut", f"{ldm}.nin_shortcut", (num_out, num_in, 1, 1))


def _attention(diffusers: str, ldm: str, width: int) -> Iterator[Key]:
    yield from _layer(f"{diffusers}.group_norm", f"{ldm}.norm", (width,))
    for linear, convolution in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        yield from _layer(f"{diffusers}.{linear}", f"{ldm}.{convolution}", (width, width))


def _layer(diffusers: str, ldm: str, shape: tuple[int, ...]) -> Iterator[Key]:
    """Weight and bias of a convolution, linear layer or norm."""
    yield Key(f"{diffusers}.weight", f"{ldm}.weight", shape)
    yield Key(f"{diffusers}.bias", f"{ldm}.bias", shape[:1])
