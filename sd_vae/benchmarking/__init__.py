"""What `sd-vae bench` and benchmarks/ measure with: turns, peak memory, the machine's ceilings, versions.

Importing this package is cheap: torch is imported when a name that needs it is first used.
"""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = [
    "Ceilings",
    "Comparison",
    "Flops",
    "Turn",
    "VersionsInUse",
    "compare",
    "count_flops",
    "measure_ceilings",
    "median_ratio",
    "peak_memory",
    "relative_difference",
    "take_turns",
    "versions_in_use",
]

_HOMES = {
    "Ceilings": "sd_vae.benchmarking.ceilings",
    "Comparison": "sd_vae.benchmarking.comparison",
    "Flops": "sd_vae.benchmarking.ceilings",
    "Turn": "sd_vae.benchmarking.timing",
    "VersionsInUse": "sd_vae.benchmarking.versions",
    "compare": "sd_vae.benchmarking.comparison",
    "count_flops": "sd_vae.benchmarking.ceilings",
    "measure_ceilings": "sd_vae.benchmarking.ceilings",
    "median_ratio": "sd_vae.benchmarking.timing",
    "peak_memory": "sd_vae.benchmarking.memory",
    "relative_difference": "sd_vae.benchmarking.timing",
    "take_turns": "sd_vae.benchmarking.timing",
    "versions_in_use": "sd_vae.benchmarking.versions",
}

if TYPE_CHECKING:
    from sd_vae.benchmarking.ceilings import Ceilings, Flops, count_flops, measure_ceilings
    from sd_vae.benchmarking.comparison import Comparison, compare
    from sd_vae.benchmarking.memory import peak_memory
    from sd_vae.benchmarking.timing import Turn, median_ratio, relative_difference, take_turns
    from sd_vae.benchmarking.versions import VersionsInUse, versions_in_use

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
