"""GroupNorm's statistics and its application on the CPU in fp32, in compiled kernels over rows of pixels."""

import numpy as np
import torch
from torch import Tensor

from sd_vae.ops import kernels
from sd_vae.ops.groupnorm import Statistics
from sd_vae.ops.threads import num_threads, run_together

__all__ = ["band_statistics"]


def band_statistics(band: Tensor, num_groups: int) -> Statistics:
    """Return the statistics of a contiguous fp32 band (R, W, C), one piece a row."""
    num_rows, num_columns, num_channels = band.shape
    mean = np.empty((num_rows, num_channels), np.float64)
    second = np.empty((num_rows, num_channels), np.float64)
    plain = band.detach().numpy()
    threads = num_threads()

    def work(thread: int) -> None:
        part = slice(num_rows * thread // threads, num_rows * (thread + 1) // threads)
        kernels.statistics(plain[part], mean[part], second[part])

    run_together(work)
    return Statistics.of_channels(torch.from_numpy(mean), torch.from_numpy(second), num_columns, num_groups)
