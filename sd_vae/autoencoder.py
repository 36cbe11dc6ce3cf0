"""The Stable Diffusion autoencoder, small to large: from a residual block to `AutoencoderKL`.

Module and parameter names are diffusers', so conversion to and from diffusers is the identity. The blocks are ours;
what makes a model a good citizen of a pipeline (saving, loading, offloading, tiling, PEFT) is inherited from diffusers.

Shapes: B batch, C latent channels, D feature channels, H W pixels (or the feature map's size), h w latent cells.

Sources: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752;
CompVis/latent-diffusion@main:ldm/modules/diffusionmodules/model.py.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sd_vae import ops, tiling
from sd_vae._diffusers import Attention as DiffusersAttention
from sd_vae._diffusers import (
    AttnProcessor2_0,
    AutoencoderKLOutput,
    DecoderOutput,
    DiffusersAutoencoderKL,
    apply_forward_hook,
    get_activation,
    register_to_config,
)
from sd_vae.checks import ensure_finite, require_image, require_latent
from sd_vae.compiling import compile_halves
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.posterior import DiagonalGaussian

__all__ = ["AutoencoderKL"]

GROUP_NORM_EPS = 1e-6  # PyTorch's default is 1e-5; published weights were trained with this one


class ResnetBlock2D(nn.Module):
    """Two normalised 3x3 convolutions beside a residual connection: (B, D_in, H, W) to (B, D_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, eps=GROUP_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, eps=GROUP_NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = get_activation(config.act_fn)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x + branch(x), with a 1x1 convolution on x where the width changes."""
        h = ops.conv3x3(ops.group_norm_silu(x, self.norm1, self.nonlinearity), self.conv1)
        h = ops.group_norm_silu(h, self.norm2, self.nonlinearity)
        return ops.conv3x3(
            h, self.conv2, residual=x if self.conv_shortcut is None else ops.conv1x1(x, self.conv_shortcut)
        )


class Attention(DiffusersAttention):
    """Single-head self-attention over all positions of a feature map, with a residual connection.

    The parameters and the processor interface are diffusers' (`set_attn_processor`, fused projections, deprecated
    names); with the default processor the computation is the one below.
    """

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__(
            channels,
            heads=1,
            dim_head=channels,
            norm_num_groups=config.norm_num_groups,
            eps=GROUP_NORM_EPS,
            bias=True,
            residual_connection=True,
            upcast_softmax=True,
            _from_deprecated_attn_block=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return attention(norm(x)) + x, (B, D, H, W)."""
        if type(self.processor) is not AttnProcessor2_0:
            return super().forward(x)
        batch_size, channels, height, width = x.shape
        # Flattened before the norm, as in diffusers: GroupNorm sums (B, D, H, W) in channels_last in another order.
        h = self.group_norm(x.flatten(2)).transpose(1, 2).unsqueeze(1)  # (B, 1, HW, D)
        h = ops.attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out[0](h)
        return h.transpose(2, 3).reshape(batch_size, channels, height, width) + x


class Downsample2D(nn.Module):
    """Halve height and width by a strided convolution: (B, D, H, W) to (B, D, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the strided convolution of x."""
        return ops.downsample_conv(x, self.conv)


class Upsample2D(nn.Module):
    """Double height and width by repetition, then convolve: (B, D, H, W) to (B, D, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of the doubled x."""
        return ops.upsample_conv(x, self.conv)


class EncoderBlock(nn.Module):
    """One level of the encoder: residual blocks, attention after each where asked, then halving."""

    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, *, attend: bool, halve: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * config.layers_per_block
        self.resnets = nn.ModuleList(ResnetBlock2D(d_in, d_out, config) for d_in, d_out in pairwise(widths))
        self.attentions = nn.ModuleList(Attention(out_channels, config) for _ in self.resnets) if attend else None
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels)]) if halve else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the level's output, half the size where it halves."""
        x = _run_layers(x, self.resnets, self.attentions)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class DecoderBlock(nn.Module):
    """One level of the decoder: residual blocks (one more than the encoder's), then doubling."""

    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, *, attend: bool, double: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (config.layers_per_block + 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(d_in, d_out, config) for d_in, d_out in pairwise(widths))
        self.attentions = nn.ModuleList(Attention(out_channels, config) for _ in self.resnets) if attend else None
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if double else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the level's output, twice the size where it doubles."""
        x = _run_layers(x, self.resnets, self.attentions)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class UNetMidBlock2D(nn.Module):
    """Residual block, attention, residual block at the smallest size; diffusers' tools look for it by this name."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, config) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, config)]) if config.mid_block_add_attention else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the middle of the network, same shape as x."""
        x = self.resnets[0](x)
        return self.resnets[1](x if self.attentions is None else self.attentions[0](x))


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) to moments before quant_conv (B, 2C, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(config.down_block_types):
            attend, halve = kind == "AttnDownEncoderBlock2D", level < len(widths) - 1
            block = EncoderBlock(widths[max(level - 1, 0)], widths[level], config, attend=attend, halve=halve)
            self.down_blocks.append(block)
        self.mid_block = UNetMidBlock2D(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return cat(mean, logvar) at 1/factor of the size."""
        x = _run_blocks(self, self.conv_in(ops.lay_out(x)), [*self.down_blocks, self.mid_block])
        return self.conv_out(ops.group_norm_silu(x, self.conv_norm_out))  # silu whatever act_fn says


class Decoder(nn.Module):
    """Latents after post_quant_conv (B, C, h, w) to images (B, out_channels, H, W), not clamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = UNetMidBlock2D(widths[0], config)
        self.up_blocks = nn.ModuleList()
        for level, kind in enumerate(config.up_block_types):
            attend, double = kind == "AttnUpDecoderBlock2D", level < len(widths) - 1
            block = DecoderBlock(widths[max(level - 1, 0)], widths[level], config, attend=attend, double=double)
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Return the picture at factor times the size."""
        x = _run_blocks(self, self.conv_in(ops.lay_out(z)), [self.mid_block, *self.up_blocks])
        return self.conv_out(ops.group_norm_silu(x, self.conv_norm_out))


def _run_layers(x: Tensor, resnets: nn.ModuleList, attentions: nn.ModuleList | None) -> Tensor:
    """Residual blocks in order, each followed by its attention where there is one."""
    for index, resnet in enumerate(resnets):
        x = resnet(x)
        if attentions is not None:
            x = attentions[index](x)
    return x


def _run_blocks(half: Any, x: Tensor, blocks: list[nn.Module]) -> Tensor:
    """Blocks in order, recomputed in the backward pass where gradient checkpointing is on."""
    recompute = half.gradient_checkpointing and torch.is_grad_enabled()
    for block in blocks:
        x = half._gradient_checkpointing_func(block, x) if recompute else block(x)
    return x


class AutoencoderKL(tiling.ExactTiling, DiffusersAutoencoderKL):
    """A KL-regularised autoencoder: images x in [-1, 1] to a posterior over raw latents z, and back.

    An instance of `diffusers.AutoencoderKL` with the same config fields, parameter names, numbers and methods; a folder
    that it saves opens in plain diffusers. Its arguments are the fields of `VAEConfig`, checked by it.

    `enable_tiling()` is exact: it bounds memory and leaves the result as it is (`sd_vae.tiling`).
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | tuple[int, int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        # Past diffusers' own __init__, which would build its encoder and decoder first.
        super(DiffusersAutoencoderKL, self).__init__()
        # A saved pipeline names its VAE's library by this attribute; set on the class, it would break pickle.
        self.__module__ = DiffusersAutoencoderKL.__module__
        config = VAEConfig.from_dict(dict(self.config), source="AutoencoderKL")
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None
        self.use_slicing = False
        self.use_tiling = False
        self.max_memory_gib: float | None = None

    @property
    def factor(self) -> int:
        """Pixels a latent cell in each direction, 8 for Stable Diffusion."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def compile(self, **options: Any) -> None:
        """Compile encode and decode in place (`sd_vae.compiling`); options are those of `torch.compile`."""
        compile_halves(self, **options)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """Return the posterior q(z|x) over raw latents (B, C, H/factor, W/factor) as `.latent_dist`.

        Args:
            x: Images (B, in_channels, H, W) in [-1, 1]; H and W divisible by `self.factor`.
            return_dict: False for a plain tuple.

        Raises:
            UserError: Wrong number of dimensions or channels, a size that the factor does not divide, or values that
                are not finite, looked for as in `sd_vae.checks.ensure_finite`.
        """
        require_image(x, self.config.in_channels, self.factor)
        slices = x.split(1) if self.use_slicing and len(x) > 1 else [x]
        moments = torch.cat([self._encode(part) for part in slices]) if len(slices) > 1 else self._encode(x)
        moments = ensure_finite(self, "encode", x, moments)
        posterior = DiagonalGaussian(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Return the pictures of raw latents, (B, out_channels, h*factor, w*factor) and not clamped, as `.sample`.

        Args:
            z: Raw latents (B, C, h, w); scaled `latents` are divided by the scaling factor (and shifted) first.
            return_dict: False for a plain tuple.
            generator: Not used; pipelines pass it, and decoding draws nothing.

        Raises:
            UserError: Wrong number of dimensions or channels, or values that are not finite, as in `encode`.
        """
        require_latent(z, self.config.latent_channels)
        slices = z.split(1) if self.use_slicing and len(z) > 1 else [z]
        parts = [self._decode(part) for part in slices]
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        x = ensure_finite(self, "decode", z, x)
        return DecoderOutput(sample=x) if return_dict else (x,)

    def _encode(self, x: Tensor) -> Tensor:
        """Moments (B, 2C, h, w) of images, in row bands where that is asked for or faster."""
        moments = tiling.in_bands(self, "encode", x)
        moments = self.encoder(x) if moments is None else moments
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, z: Tensor) -> Tensor:
        """Pictures of raw latents, in row bands where that is asked for or faster."""
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        x = tiling.in_bands(self, "decode", z)
        return self.decoder(z) if x is None else x

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Return the reconstruction of images, through the posterior's mode or a sample of it.

        Args:
            sample: Images (B, in_channels, H, W) in [-1, 1]. The name is diffusers'.
            sample_posterior: Draw z from the posterior instead of taking its mode.
            return_dict: False for a plain tuple.
            generator: Source of the draw.
        """
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "AutoencoderKL":
        """Return a model with random weights in the architecture of a preset: sd1, sdxl, sd3, flux, mini.

        Args:
            name: Preset.
            overrides: Fields of `VAEConfig` that differ from it, such as `block_out_channels`.

        Raises:
            UserError: Unknown preset or field, or a config that breaks a rule.
        """
        config = VAEConfig.from_dict(VAEConfig.from_preset(name).to_dict() | overrides, source=f"preset {name}")
        return cls(**config.to_dict())

    @classmethod
    def from_diffusers(cls, vae: DiffusersAutoencoderKL) -> "AutoencoderKL":
        """Return this class around the weights of a diffusers VAE: shared, not copied, same device and dtype.

        Raises:
            UserError: Not a `diffusers.AutoencoderKL`, or one that holds LoRA adapters.
        """
        return _rebuild(cls, vae)

    def to_diffusers(self) -> DiffusersAutoencoderKL:
        """Return a plain diffusers VAE around these weights: shared, not copied, same device and dtype."""
        return _rebuild(DiffusersAutoencoderKL, self)


def _rebuild(cls: type[Any], vae: DiffusersAutoencoderKL) -> Any:
    """`vae` as an instance of `cls`, holding the very same parameters."""
    if not isinstance(vae, DiffusersAutoencoderKL):
        raise UserError(f"vae is of type {type(vae).__name__}, it must be a diffusers.AutoencoderKL; load it first.")
    with torch.device("meta"):
        # Without diffusers' note of defaults, which would undo what `register_to_config` has changed since.
        twin = cls.from_config({key: value for key, value in vae.config.items() if key != "_use_default_values"})
    # A projection fused by `fuse_qkv_projections` repeats q, k and v, which the twin has apart.
    weights = {name: weight for name, weight in vae.named_parameters() if ".to_qkv." not in name}
    foreign = sorted(weights.keys() ^ dict(twin.named_parameters()).keys())
    if foreign:
        raise UserError(f"the VAE's tensors are not those of its config, see {foreign[0]}; unload its adapters first.")
    for name, weight in weights.items():
        module_name, _, leaf = name.rpartition(".")
        twin.get_submodule(module_name).register_parameter(leaf, weight)
    return twin.train(vae.training)
