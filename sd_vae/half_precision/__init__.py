"""Half precision that cannot fail: where activations overflow float16, weights that do not, and what a run does then.

Importing this package is cheap: torch is imported when a name that needs it is first used.
"""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = ["LayerRange", "ProbeReport", "Rescaling", "load_pictures", "probe", "rescale_for_float16"]

_HOMES = {
    "LayerRange": "sd_vae.half_precision.ranges",
    "ProbeReport": "sd_vae.half_precision.ranges",
    "Rescaling": "sd_vae.half_precision.rescale",
    "load_pictures": "sd_vae.half_precision.ranges",
    "probe": "sd_vae.half_precision.ranges",
    "rescale_for_float16": "sd_vae.half_precision.rescale",
}

if TYPE_CHECKING:
    from sd_vae.half_precision.ranges import LayerRange, ProbeReport, load_pictures, probe
    from sd_vae.half_precision.rescale import Rescaling, rescale_for_float16

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
