"""Weights beyond float16, rescaled and run in it: `python -m benchmarks.half_precision`, a minute.

An architecture with random weights and log-normal GroupNorm gains has four of its streams multiplied until they pass
65504, as the public SDXL VAE's do, without changing what it computes. A middle piece of a photo that ships inside
scikit-image is then run through plain diffusers in real float16 on the CPU, with these weights and with what
`rescale_for_float16` makes of them, and both are compared with float32. Appended to benchmarks/half_precision.md.
"""

import argparse
import copy
import math
import sys

import torch
from PIL import Image
from torch import Tensor

from benchmarks.figures import ROOT, append
from sd_vae import PRESETS, AutoencoderKL, to_tensor
from sd_vae.benchmarking import relative_difference
from sd_vae.config import VAEConfig
from sd_vae.half_precision import probe, rescale_for_float16
from sd_vae.half_precision.streams import layer_scales, trace

TABLE = ROOT / "benchmarks" / "half_precision.md"
HEAD = """# Half precision

Appended by `python -m benchmarks.half_precision`; the newest run is last. Plain diffusers in float16 on a CPU; figures
are the largest difference to float32, of the largest magnitude.
"""
LOUD = 2.0**18
"""Largest magnitude that the multiplied streams are given, four times what float16 holds."""
STREAMS = (
    "encoder.mid_block.resnets.1.conv1",
    "decoder.conv_in",
    "decoder.mid_block.resnets.0.conv1",
    "decoder.up_blocks.1.upsamplers.0.conv",
)
"""Two residual streams and two branches."""


@torch.no_grad()
def make_loud(preset: str, x: Tensor) -> AutoencoderKL:
    """Return random weights whose STREAMS go beyond float16 on these images (1, 3, H, W)."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset(preset).eval()
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.normal_(std=0.5).exp_()
    network = trace(VAEConfig.from_dict(dict(vae.config)))
    report = probe(vae, [x])
    scales = {}
    for name in STREAMS:
        peak = max(report[place].peak for place in network.streams[name].places)
        scales[name] = 2.0 ** math.ceil(math.log2(LOUD / peak))
    for name, weight_scale, bias_scale in layer_scales(network, scales):
        layer = vae.get_submodule(name)
        layer.weight.mul_(weight_scale)
        layer.bias.mul_(bias_scale)
    return vae


@torch.no_grad()
def measure(preset: str, size: int) -> str:
    """Return the table, and a line about the rescaling."""
    from skimage.data import astronaut

    photo = to_tensor(Image.fromarray(astronaut()))
    start = (photo.shape[-1] - size) // 2
    x = photo[..., start : start + size, start : start + size]
    loud = make_loud(preset, x)
    rescaled, rescaling = rescale_for_float16(loud, [x])
    mean = loud.encode(x).latent_dist.mean
    recon = loud.decode(mean).sample
    lines = ["| weights | mean | decode |", "|---|--:|--:|"]
    for name, vae in (("as they are", loud), ("rescaled", rescaled)):
        half = copy.deepcopy(vae).to_diffusers().half()
        found = half.encode(x.half()).latent_dist.mean, half.decode(mean.half()).sample
        differences = (relative_difference(ours, exact) for ours, exact in zip(found, (mean, recon), strict=True))
        lines.append(f"| {name} | " + " | ".join(map(_in_words, differences)) + " |")
    return "\n".join(lines) + (
        f"\n\n{preset}, {size}x{size} pixels: {len(rescaling.before.overflowing)} layers overflowed, "
        f"{len(rescaling.after.overflowing)} do now; {len(rescaling.scales)} streams in {rescaling.num_layers} layers "
        f"rescaled; change in float32 predicted {rescaling.predicted_change:.1e}, measured "
        f"{rescaling.measured_change:.1e}"
    )


def _in_words(difference: float) -> str:
    return f"{difference:.1e}" if math.isfinite(difference) else "not finite"


def main(argv: list[str]) -> int:
    """Measure, print the table, keep it where the model is SDXL's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="sdxl", choices=sorted(PRESETS))
    parser.add_argument("--size", type=int, default=32, help="pixels of a side of the piece of photo, up to 512")
    options = parser.parse_args(argv)
    table = measure(options.preset, options.size)
    print(table)
    if options.preset == "sdxl":
        append(TABLE, HEAD, table, " ".join(["python -m benchmarks.half_precision", *argv]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
