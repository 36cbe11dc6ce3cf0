"""How much of the device a run uses: arithmetic of a picture, pictures a second, share of the peak.

Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B (model FLOPs utilisation).
"""

import time

import torch

from sd_vae.autoencoder import AutoencoderKL

__all__ = ["PEAK_TFLOPS", "Throughput", "training_flops"]

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "A10": 125.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Dense half-precision peak by a part of the device's name, from NVIDIA's data sheets; the first that fits counts."""


def training_flops(vae: AutoencoderKL, size: int) -> float:
    """Return the floating-point operations of a training step, a picture: of encoder and decoder, not of the losses.

    A backward pass counts twice the forward pass, and where no weight of the encoder trains it has none.

    Args:
        vae: Model.
        size: Side of the pictures in pixels.
    """
    import diffusers
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        plain = diffusers.AutoencoderKL.from_config(dict(vae.config))
        counts = []
        shapes = ((3, size, size), (plain.config.latent_channels, size // vae.factor, size // vae.factor))
        for module, shape in zip((plain.encoder, plain.decoder), shapes, strict=True):
            with FlopCounterMode(display=False) as counter:
                module(torch.empty(1, *shape))
            counts.append(counter.get_total_flops())
    encoder, decoder = counts
    trains = any(parameter.requires_grad for parameter in vae.encoder.parameters())
    return float(3 * decoder + (3 if trains else 1) * encoder)


class Throughput:
    """Rates between two rows of the log.

    Args:
        flops: `training_flops`; None on a CPU, where it says little.
        device: Where the run is.
        num_devices: Devices of all processes.
        samples: Pictures consumed so far.
    """

    def __init__(self, flops: float | None, device: torch.device, num_devices: int, samples: int) -> None:
        self.flops = flops
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((num_devices * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
        self.last = time.perf_counter(), samples

    def rows(self, samples: int) -> dict[str, float]:
        """Return `images_per_s` and, on a GPU, `tflops_per_s` and `mfu`, its share of a known peak, since last time."""
        now = time.perf_counter()
        images_per_s = (samples - self.last[1]) / (now - self.last[0])
        self.last = now, samples
        if self.flops is None:
            return {"images_per_s": images_per_s}
        tflops_per_s = images_per_s * self.flops / 1e12
        rows = {"images_per_s": images_per_s, "tflops_per_s": tflops_per_s}
        return rows if self.peak is None else {**rows, "mfu": tflops_per_s / self.peak}
