"""The data of a training run as data: where the pictures are and how they are cropped."""

import math
from dataclasses import dataclass

from sd_vae.errors import UserError
from sd_vae.validation import STRICT

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Pictures to train on, pictures to look at, and the random crop of each."""

    __pydantic_config__ = STRICT

    train: str
    """Folder of pictures (with the folders below it), parquet file or folder of them, or hf://DATASET[:SPLIT]."""
    validation: str | None = None
    """Held-out pictures, from the same kinds of place; reconstructed at intervals, never trained on."""
    size: int = 256
    """Side of the square crops, in pixels."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Bounds of the crop's side as a fraction of the picture's shorter side; the crop is then resized to `size`. No
    crop is taken smaller than `size` pixels where the picture has them."""
    flip: bool = True
    """Mirror half of the crops."""
    num_workers: int = 2
    """Processes that read pictures, for each training process; 0 reads in the training process. Crops do not depend
    on it."""
    image_column: str = "image"
    """Column with the pictures in parquet files and hub data sets."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = [
            f"data.{name} is empty, name a folder, a parquet file or hf://DATASET"
            for name in ("train", "validation")
            if getattr(self, name) == ""
        ]
        if self.size < 1:
            problems.append(f"data.size is {self.size}, it must be at least 1 pixel")
        smallest, largest = self.crop_scale
        if not (math.isfinite(largest) and 0 < smallest <= largest <= 1):
            problems.append(f"data.crop_scale is ({smallest}, {largest}), it must satisfy 0 < smallest <= largest <= 1")
        if self.num_workers < 0:
            problems.append(f"data.num_workers is {self.num_workers}, it must be 0 or more")
        if not self.image_column:
            problems.append("data.image_column is empty, name the column with the pictures")
        if problems:
            raise UserError("not a usable data config: " + "; ".join(problems) + ".")
