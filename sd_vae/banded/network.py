"""Encoder and decoder in row bands: the same layers as `sd_vae.autoencoder`, with every band's end of life written out.

The result is the whole map's: GroupNorm's statistics are merged over all bands before any is normalised, convolutions
read one row of their neighbours, attention sees the (small) map at once. Peak memory is two maps at the largest size,
or one and a half times the widest where a level changes width, against four in a plain forward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sd_vae.banded.bands import Bands
from sd_vae.banded.engines import TorchEngine

__all__ = ["BandedNetwork"]


class BandedNetwork:
    """Runs the encoder or decoder of an `AutoencoderKL`, one picture at a time.

    Args:
        engine: What does the arithmetic.
    """

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        """Return the moments before quant_conv, (1, 2C, h, w), of one picture (1, 3, H, W)."""
        h = self._conv(self._external(x), encoder.conv_in)
        for block in encoder.down_blocks:
            h = self._level(block, h)
            if block.downsamplers is not None:
                h = self._halve(h, block.downsamplers[0].conv)
        h = self._middle(encoder.mid_block, h)
        return self._leave(h, encoder, encoder.conv_out)

    def decode(self, decoder: Any, z: Tensor) -> Tensor:
        """Return the picture (1, 3, H, W) of one latent after post_quant_conv, (1, C, h, w)."""
        h = self._middle(decoder.mid_block, self._conv(self._external(z), decoder.conv_in))
        for block in decoder.up_blocks:
            h = self._level(block, h)
            if block.upsamplers is not None:
                h = self._double(h, block.upsamplers[0].conv)
        return self._leave(h, decoder, decoder.conv_out)

    def _middle(self, block: Any, x: Bands) -> Bands:
        x = self._residual(block.resnets[0], x)
        if block.attentions is not None:
            x = self._attend(block.attentions[0], x)
        return self._residual(block.resnets[1], x)

    def _level(self, block: Any, x: Bands) -> Bands:
        for index, resnet in enumerate(block.resnets):
            x = self._residual(resnet, x)
            if block.attentions is not None:
                x = self._attend(block.attentions[index], x)
        return x

    def _residual(self, block: Any, x: Bands) -> Bands:
        """A residual block; x is consumed, and its bands hold the result where the width stays."""
        norm = self.engine.norm(x, block.norm1)
        if block.conv_shortcut is None:
            h = self._conv(x, block.conv1, norm, keep=True)
        else:
            skip = self._empty(x.height, x.width, block.norm2.num_channels)
            h = self._conv(x, block.conv1, norm, skip=skip, shortcut=block.conv_shortcut)
            x = skip
        return self._conv(h, block.conv2, self.engine.norm(h, block.norm2), onto=x)

    def _attend(self, attention: nn.Module, x: Bands) -> Bands:
        """Attention over the whole map, by calling the module, whatever its processor is."""
        self.engine.workspace.trim()  # attention takes several maps of its own
        result = attention(self.engine.whole(x))[0].permute(1, 2, 0)
        statistics = []
        for band, row in x.each():
            band.copy_(result[row : row + len(band)])
            statistics.append(self.engine.statistics(band))
        x.statistics = statistics
        return x

    def _conv(
        self,
        source: Bands,
        conv: Any,
        norm: tuple[Tensor, Tensor] | None = None,
        *,
        keep: bool = False,
        onto: Bands | None = None,
        skip: Bands | None = None,
        shortcut: nn.Module | None = None,
    ) -> Bands:
        """3x3 convolution of the normalised source, added `onto` other bands where they are given.

        The source is let go of as it is passed, unless it is kept; a shortcut of it is taken into `skip` on the way.
        """
        engine = self.engine
        prepared = engine.prepare(conv)
        out = self._empty(source.height, source.width, _out_channels(conv)) if onto is None else onto
        side_conv = None if shortcut is None else engine.prepare(shortcut)
        statistics = []
        for start, stop in self._ranges(out):
            band = engine.take(stop - start, out.width, out.channels) if onto is None else onto.pieces(start, stop)[0]
            engine.convolve(source, start, stop, prepared, norm, band, add=onto is not None)
            statistics.append(engine.statistics(band))
            if onto is None:
                out.append(band)
            if skip is not None:
                side = engine.take(stop - start, out.width, out.channels)
                engine.pointwise(source, start, stop, side_conv, side)
                skip.append(side)
            if not keep:
                source.release(stop - 1)
        if not keep:
            source.release()
        out.statistics = statistics
        return out

    def _double(self, source: Bands, conv: Any) -> Bands:
        out = self._empty(2 * source.height, 2 * source.width, _out_channels(conv))
        prepared = self.engine.prepare(conv)
        for start, stop in self._ranges(out):
            band = self.engine.take(stop - start, out.width, out.channels)
            self.engine.double(source, start, stop, prepared, band)
            out.append(band)
            out.statistics.append(self.engine.statistics(band))
            source.release(stop // 2 - 1)
        source.release()
        return out

    def _halve(self, source: Bands, conv: Any) -> Bands:
        out = self._empty(source.height // 2, source.width // 2, _out_channels(conv))
        prepared = self.engine.prepare(conv)
        for start, stop in self._ranges(out):
            band = self.engine.take(stop - start, out.width, out.channels)
            self.engine.halve(source, start, stop, prepared, band)
            out.append(band)
            out.statistics.append(self.engine.statistics(band))
            source.release(2 * stop)
        source.release()
        return out

    def _leave(self, source: Bands, half: Any, conv: Any) -> Tensor:
        """The last convolution, into a tensor of the caller's own: (1, C, H, W)."""
        engine = self.engine
        norm = engine.norm(source, half.conv_norm_out)
        shape = (1, _out_channels(conv), source.height, source.width)
        result = torch.empty(shape, dtype=engine.dtype, device=engine.device)
        rows = result[0].permute(1, 2, 0)
        for start, stop in self._ranges(source):
            engine.convolve(source, start, stop, conv, norm, rows[start:stop], add=False)
            source.release(stop - 1)
        source.release()
        return result

    def _external(self, x: Tensor) -> Bands:
        """The caller's tensor as a map of one band, pixels in order, which is not ours to give back."""
        bands = Bands(x.shape[2], x.shape[3], x.shape[1], give=lambda _: None)
        bands.append(x[0].permute(1, 2, 0).contiguous())  # the kernels read rows by their address
        return bands

    def _empty(self, height: int, width: int, channels: int) -> Bands:
        return Bands(height, width, channels, give=self.engine.give)

    def _ranges(self, out: Bands) -> list[tuple[int, int]]:
        """First row and the one past the last of each band of a map."""
        step = self.engine.rows_per_band(out.width, out.channels)
        return [(start, min(start + step, out.height)) for start in range(0, out.height, step)]


def _out_channels(conv: Any) -> int:
    """Channels that a convolution gives, or one that an adapter has wrapped."""
    return int(getattr(conv, "base_layer", conv).out_channels)
