"""Which layers of the network share a scale: the algebra of a rescaling that its outcome does not see.

A stream is a set of feature maps that can only be scaled together, because they are added to one another. A residual
stream begins at conv_in, at a 1x1 shortcut or at a convolution that halves or doubles, and runs through sums and
attention to the next of these. Each conv1 has a stream of its own that ends in norm2; each attention has one for v
that ends in to_out, and one for q, whose scale k takes back. Everything else that reads a stream is a GroupNorm, which
does not see its scale except beside eps, or a layer that carries it into the next stream.

So a layer that reads a stream of scale s and writes one of scale t takes weight * t / s and bias * t, where what is no
stream has scale 1; and a GroupNorm that reads a stream of scale s acts as with eps / s^2 on the original.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from sd_vae.config import VAEConfig

__all__ = ["Layer", "Network", "Stream", "layer_scales", "norm_scales", "trace"]


@dataclass(frozen=True)
class Layer:
    """A layer that reads or writes a stream."""

    name: str
    """Module with a weight and a bias."""
    reads: str | None
    """Stream that it reads unnormalised, by name."""
    writes: str
    """Stream that it writes, by name."""
    takes_back: bool = False
    """It writes with the inverse of the stream's scale: to_k, beside to_q."""


@dataclass
class Stream:
    """Feature maps of one scale."""

    name: str
    """The layer that it begins at."""
    places: list[str] = field(default_factory=list)
    """Rows of a probe whose values are in it, `name` among them."""
    norms: list[str] = field(default_factory=list)
    """GroupNorms that read it."""
    counterpart: str | None = None
    """Row of a probe that takes the inverse scale: to_k, beside to_q."""


@dataclass
class Network:
    """Every stream of a VAE by name, and every layer that reads or writes one."""

    streams: dict[str, Stream] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)


def trace(config: VAEConfig) -> Network:
    """Return the streams of an architecture, in the network's order."""
    network = Network()
    widths = config.block_out_channels
    encoder = _Walk(network, "encoder")
    for level, kind in enumerate(config.down_block_types):
        block = f"down_blocks.{level}"
        inside = [widths[max(level - 1, 0)]] + [widths[level]] * config.layers_per_block
        encoder.level(block, inside, attends=kind.startswith("Attn"))
        if level < len(widths) - 1:
            encoder.open(f"{block}.downsamplers.0.conv")
    encoder.middle(attends=config.mid_block_add_attention)
    encoder.norm("conv_norm_out")

    widths = widths[::-1]
    decoder = _Walk(network, "decoder")
    decoder.middle(attends=config.mid_block_add_attention)
    for level, kind in enumerate(config.up_block_types):
        block = f"up_blocks.{level}"
        inside = [widths[max(level - 1, 0)]] + [widths[level]] * (config.layers_per_block + 1)
        decoder.level(block, inside, attends=kind.startswith("Attn"))
        if level < len(widths) - 1:
            decoder.open(f"{block}.upsamplers.0.conv")
    decoder.norm("conv_norm_out")
    return network


def layer_scales(network: Network, scales: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """Yield (layer, factor of its weight, factor of its bias) wherever one is not 1.

    Args:
        network: From `trace`.
        scales: Scale of a stream by name; 1 where it is left out.
    """
    for layer in network.layers:
        read = scales.get(layer.reads, 1.0) if layer.reads else 1.0
        write = scales.get(layer.writes, 1.0)
        if layer.takes_back:
            write = 1 / write
        if (write / read, write) != (1.0, 1.0):
            yield layer.name, write / read, write


def norm_scales(network: Network, scales: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield (GroupNorm, scale of the stream that it reads) wherever that is not 1; the arguments are as above."""
    for stream in network.streams.values():
        scale = scales.get(stream.name, 1.0)
        if scale != 1.0:
            yield from ((norm, scale) for norm in stream.norms)


class _Walk:
    """One half of the network from conv_in on; `current` is the residual stream that the next block reads."""

    def __init__(self, network: Network, half: str) -> None:
        self._network, self._half = network, half
        self.current = self._stream("conv_in")
        self._write("conv_in", self.current)

    def level(self, block: str, widths: list[int], *, attends: bool) -> None:
        for index, (d_in, d_out) in enumerate(pairwise(widths)):
            self.resnet(f"{block}.resnets.{index}", widens=d_in != d_out)
            if attends:
                self.attention(f"{block}.attentions.{index}")

    def middle(self, *, attends: bool) -> None:
        self.resnet("mid_block.resnets.0", widens=False)
        if attends:
            self.attention("mid_block.attentions.0")
        self.resnet("mid_block.resnets.1", widens=False)

    def resnet(self, name: str, *, widens: bool) -> None:
        self.norm(f"{name}.norm1")
        branch = self._stream(f"{name}.conv1")
        self._write(f"{name}.conv1", branch)
        branch.norms.append(f"{self._half}.{name}.norm2")
        if widens:
            self.open(f"{name}.conv_shortcut")
        self._write(f"{name}.conv2", self.current)
        self.current.places.append(f"{self._half}.{name}")  # the sum

    def attention(self, name: str) -> None:
        self.norm(f"{name}.group_norm")
        q, v = self._stream(f"{name}.to_q"), self._stream(f"{name}.to_v")
        q.counterpart = f"{self._half}.{name}.to_k"
        self._write(f"{name}.to_q", q)
        self._network.layers.append(Layer(q.counterpart, None, q.name, takes_back=True))
        self._write(f"{name}.to_v", v)
        self._write(f"{name}.to_out.0", self.current, reads=v)
        self.current.places.append(f"{self._half}.{name}")

    def open(self, name: str) -> None:
        """Begin the next residual stream, at a layer that reads the current one."""
        following = self._stream(name)
        self._write(name, following, reads=self.current)
        self.current = following

    def norm(self, name: str) -> None:
        self.current.norms.append(f"{self._half}.{name}")

    def _stream(self, name: str) -> Stream:
        stream = Stream(f"{self._half}.{name}")
        self._network.streams[stream.name] = stream
        return stream

    def _write(self, name: str, stream: Stream, reads: Stream | None = None) -> None:
        stream.places.append(f"{self._half}.{name}")
        self._network.layers.append(Layer(f"{self._half}.{name}", reads.name if reads else None, stream.name))
