"""Sections of a run's config that change nothing of its result: where it is seen, and how fast it goes."""

from dataclasses import dataclass

from sd_vae.errors import UserError
from sd_vae.validation import STRICT

__all__ = ["BEST_METRICS", "ReportConfig", "SpeedConfig"]

NETS = ("lpips_vgg", "lpips_alex", "lpips_squeeze")

BEST_METRICS = dict.fromkeys(("psnr_db", "ssim", "ms_ssim"), True) | dict.fromkeys(
    (*NETS, "l1", "ciede2000", *(f"loss/{term}" for term in ("reconstruction", *NETS, "distilled", "ms_dssim"))),
    False,
)
"""Validation metrics that can choose the best weights, and whether more is better: those of an evaluation, and the
terms of the loss where it has them."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Where a run is seen, and where its result goes."""

    __pydantic_config__ = STRICT

    wandb_project: str | None = None
    """Project of Weights & Biases that gets the numbers and pictures too; needs the extra `wandb`."""
    best_metric: str | None = None
    """Validation metric whose best weights are kept in best/: one that `protocol` measures, such as psnr_db or
    lpips_alex, or a term of the loss, such as loss/reconstruction or loss/lpips_vgg."""
    protocol: str = "native"
    """How validation photos are measured: a protocol of `sd-vae eval`, at data.size where it has no size of its own."""
    push_to_hub: str | None = None
    """Repository USER/NAME of the hub that the finished VAE is uploaded to."""
    hub_private: bool = True
    """Make that repository private where it is new."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = []
        if self.best_metric is not None and self.best_metric not in BEST_METRICS:
            problems.append(f"report.best_metric is {self.best_metric!r}, choose one of: {', '.join(BEST_METRICS)}")
        if self.wandb_project == "":
            problems.append("report.wandb_project is empty, name a project or leave it out")
        if self.push_to_hub is not None and [bool(part) for part in self.push_to_hub.split("/")] != [True, True]:
            problems.append(f"report.push_to_hub is {self.push_to_hub!r}, write USER/NAME")
        if problems:
            raise UserError("; ".join(problems) + ".")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How fast a run goes; the numbers it gives stay the same up to rounding."""

    __pydantic_config__ = STRICT

    rehearse: bool = True
    """On a GPU, take the largest step once before the run and drop it, so that too little memory shows at once."""
    compile: bool = False
    """Compile the autoencoder with torch.compile; minutes at the start, then faster steps on a GPU."""
