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

    train: str | tuple[str, ...]
    """Folder of pictures (with the folders below it), parquet file or folder of them, WebDataset tars (one, a folder of
    them, shards/{0000..0099}.tar, or https://HOST/{0000..0099}.tar), or hf://DATASET[:SPLIT]; or several of these."""
    weights: tuple[float, ...] = ()
    """Share of the samples that comes from each of several sources, relative to the others; by their number of pictures
    where none are given."""
    validation: str | None = None
    """Held-out pictures, from the same kinds of place; reconstructed at intervals, never trained on."""
    size: int = 256
    """Side of the square crops, in pixels."""
    min_size: int | None = None
    """Side of the smallest crops, in pixels: every step then trains on crops of one side, drawn from here to `size` in
    whole latent cells. None has crops of `size` alone."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Bounds of the crop's side as a fraction of the picture's shorter side; the crop is then resized to `size`. No
    crop is taken smaller than `size` pixels where the picture has them."""
    flip: bool = True
    """Mirror half of the crops."""
    num_workers: int = 2
    """Processes that read pictures, for each training process; 0 reads in the training process. Crops do not depend
    on it."""
    image_column: str = "image"
    """Column with the pictures in parquet files and hub data sets; in tars, where it is not `image`, their ending."""
    streaming: bool = False
    """Read hub data sets without downloading them first. Every process reads all of a stream."""
    shuffle_window: int = 20_000
    """Tars and streams are shuffled within windows of this many pictures, after their tars have been; what is needed at
    a time then lies close together. Of a stream, a window is held in memory. 0 shuffles all tars as a whole."""
    timeout_s: float = 300.0
    """Seconds without a picture after which a stream is opened again, and a batch of the workers ends the run; requests
    for parts of remote tars are given up early enough that all their retries fit into half of it."""
    retries: int = 5
    """Times in a row that a stream is opened again, and that a part of a remote tar is asked for again."""

    @property
    def sources(self) -> tuple[str, ...]:
        """What `train` names, one or several."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def request_timeout_s(self) -> float:
        """Seconds without a byte after which a request for a part of a remote tar is given up."""
        return self.timeout_s / 2 / (self.retries + 1)

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = [
            f"data.{name} is empty, name a folder, a parquet file or hf://DATASET"
            for name, specs in (("train", self.sources), ("validation", (self.validation,)))
            if "" in specs or not specs
        ]
        if len(set(self.sources)) < len(self.sources):
            problems.append("data.train names a source twice; give it more weight instead")
        if self.weights and len(self.weights) != len(self.sources):
            problems.append(
                f"data.weights holds {len(self.weights)} numbers for {len(self.sources)} sources in data.train"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            problems.append(f"data.weights is {list(self.weights)}, each must be a finite number above 0")
        if self.size < 1:
            problems.append(f"data.size is {self.size}, it must be at least 1 pixel")
        if self.min_size is not None and not 1 <= self.min_size <= self.size:
            problems.append(f"data.min_size is {self.min_size}, it must be from 1 to data.size, {self.size}")
        smallest, largest = self.crop_scale
        if not (math.isfinite(largest) and 0 < smallest <= largest <= 1):
            problems.append(f"data.crop_scale is ({smallest}, {largest}), it must satisfy 0 < smallest <= largest <= 1")
        for name in ("num_workers", "shuffle_window", "retries"):
            if getattr(self, name) < 0:
                problems.append(f"data.{name} is {getattr(self, name)}, it must be 0 or more")
        if not 0 < self.timeout_s < math.inf:
            problems.append(f"data.timeout_s is {self.timeout_s}, it must be a finite number of seconds above 0")
        if not self.image_column:
            problems.append("data.image_column is empty, name the column with the pictures")
        if problems:
            raise UserError("not a usable data config: " + "; ".join(problems) + ".")
