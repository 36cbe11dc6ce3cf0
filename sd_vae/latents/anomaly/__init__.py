"""Which pictures are unlike normal ones, and where: a detector fitted to normal pictures alone. See docs/anomaly.md.

Importing this package is cheap: torch is imported when a name that needs it is first used.
"""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = [
    "SCORES",
    "Detection",
    "Detector",
    "Findings",
    "FitConfig",
    "Origin",
    "Threshold",
    "choose_threshold",
    "fit",
    "load_detector",
    "measure_detection",
    "save_detector",
    "score",
    "vae_fingerprint",
]

_HOMES = {
    "SCORES": "sd_vae.latents.anomaly.detector",
    "Detection": "sd_vae.latents.anomaly.thresholds",
    "Detector": "sd_vae.latents.anomaly.detector",
    "Findings": "sd_vae.latents.anomaly.detector",
    "FitConfig": "sd_vae.latents.anomaly.fitting",
    "Origin": "sd_vae.latents.anomaly.storage",
    "Threshold": "sd_vae.latents.anomaly.thresholds",
    "choose_threshold": "sd_vae.latents.anomaly.thresholds",
    "fit": "sd_vae.latents.anomaly.fitting",
    "load_detector": "sd_vae.latents.anomaly.storage",
    "measure_detection": "sd_vae.latents.anomaly.thresholds",
    "save_detector": "sd_vae.latents.anomaly.storage",
    "score": "sd_vae.latents.anomaly.detector",
    "vae_fingerprint": "sd_vae.latents.anomaly.storage",
}

if TYPE_CHECKING:
    from sd_vae.latents.anomaly.detector import SCORES, Detector, Findings, score
    from sd_vae.latents.anomaly.fitting import FitConfig, fit
    from sd_vae.latents.anomaly.storage import Origin, load_detector, save_detector, vae_fingerprint
    from sd_vae.latents.anomaly.thresholds import Detection, Threshold, choose_threshold, measure_detection

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
