"""Where training and evaluation meet: the evaluator that a training run measures its validation photos with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.validation import Evaluate

__all__ = ["evaluator_of"]


def evaluator_of(config: TrainConfig) -> Evaluate | None:
    """Return what measures the validation photos of a run by its protocol; None where it has none.

    Raises:
        UserError: No such protocol, or a metric network's weights are not what they should be.
    """
    if config.data.validation is None:
        return None
    from eval.validation import Validator

    perceptual = config.loss.perceptual
    weights: dict[str, str] = {}
    if perceptual.net in ("vgg", "alex", "squeeze") and perceptual.backbone:
        weights[perceptual.net] = perceptual.backbone
    return Validator(config.report.protocol, size=config.data.size, weights=weights)
