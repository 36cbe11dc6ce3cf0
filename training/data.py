"""From a config to pictures: what a run trains on and looks at, its batches, and what of it could not be read."""

import dataclasses
import logging
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from sd_vae.data import Batch, open_images, open_training_source, training_loader
from sd_vae.errors import UserError

from .checkpoint import Progress
from .config import TrainConfig
from .validation import ChosenImages, load_photos, readable, require_readable

__all__ = ["TrainingData"]

logger = logging.getLogger(__name__)

NUM_LISTED = 1000
"""Unreadable pictures that a checkpoint names; those beyond are counted."""


class TrainingData:
    """The pictures of a run, on one of its processes.

    Args:
        config: The run.
        accelerator: Says which process this is, of how many.

    Raises:
        UserError: A source is not there, holds no picture that can be read, or is not what the config says.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        with accelerator.main_process_first():  # it makes the index of tars, which the others find
            self.source = open_training_source(config.data, config.seed)
        for images in self.source.images:
            require_readable(images)
        self.validation = self._validation_images()
        self.photos = None if self.validation is None else load_photos(self.validation, config.data.size)
        self.num_rejects = 0
        """Attempts of this process to read a picture that failed, since the run or its last resumption began."""
        self.num_retries = 0
        """Requests of this process over the network that were made again, likewise."""
        self.rejects_before, self.retries_before = 0, 0
        """Those of all processes until then."""
        self.unreadable: dict[str, None] = {}
        """Why pictures could not be read, each once, in the order they were met."""

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield the batches of this process without end, from sample `start` of the run on."""
        self._note(self.source.problems)
        loader = training_loader(
            self.source,
            self.config.data,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start=start,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for batch in loader:
            self.num_rejects += len(batch.unreadable)
            self.num_retries += batch.num_retries
            self._note(batch.unreadable)
            yield batch

    def first_photos(self, num_images: int) -> Tensor:
        """Return training photos, resized and centre-cropped, (N, 3, S, S) in [-1, 1]; as many of each source."""
        if not self.source.images:
            return next(iter(training_loader(self.source, self.config.data, batch_size=num_images, seed=0))).x
        share = max(1, num_images // len(self.source.images))
        size = self.config.data.size
        return torch.cat([load_photos(readable(images, share), size) for images in self.source.images])

    @property
    def described(self) -> str:
        """How many pictures there are, in words."""
        streams = [stream.spec for stream in self.source.streams]
        pictures = [f"{len(self.source):,} pictures"] if self.source.images else []
        return " and ".join([*pictures, *streams])

    def noted(self, progress: Progress) -> Progress:
        """Return the progress with what all processes together could not read, `NUM_LISTED` reasons at most."""
        reopened = sum(stream.num_reopened for stream in self.source.streams)
        names, counts = list(self.unreadable), [(self.num_rejects, self.num_retries + reopened)]
        if self.accelerator.num_processes > 1:
            names, counts = gather_object(names), gather_object(counts)
        rejects, retries = (sum(numbers) for numbers in zip(*counts, strict=True))
        return dataclasses.replace(
            progress,
            unreadable=tuple(dict.fromkeys(names))[:NUM_LISTED],
            rejects=self.rejects_before + rejects,
            retries=self.retries_before + retries,
            num_processes=self.accelerator.num_processes,
        )

    def go_on_from(self, before: Progress) -> None:
        """Take up a checkpoint's position, and say what is not as it was.

        Raises:
            UserError: There are more or fewer pictures than before, so the order would differ.
        """
        if before.num_pictures != len(self.source):
            raise UserError(
                f"{self.source.spec} holds {len(self.source)} pictures, the checkpoint of step {before.step} was "
                f"trained on {before.num_pictures}, so the order would differ; restore them, or start anew."
            )
        self.unreadable = dict.fromkeys(before.unreadable)
        self.rejects_before, self.retries_before = before.rejects, before.retries
        if before.num_processes not in (0, self.accelerator.num_processes):
            now, then = self.accelerator.num_processes, before.num_processes
            pictures = self.config.batch_size * self.config.gradient_accumulation_steps
            logger.warning(
                "%d process%s now, %d before: a step is %d pictures, it was %d. The order goes on at picture %d; none "
                "is left out and none comes twice. Adjust batch_size or optim.lr if the step's size matters",
                *(now, "" if now == 1 else "es", then, now * pictures, then * pictures, before.samples),
            )
        for stream in self.source.streams:
            logger.warning(
                "%s is a stream without an index: it is read again up to picture %d; pictures of a stream that has "
                "changed since come at least once, some twice",
                *(stream.spec, before.samples),
            )

    def _validation_images(self) -> ChosenImages | None:
        data = self.config.data
        if data.validation is None:
            return None
        return readable(open_images(data.validation, data.image_column), self.config.num_validation_images)

    def _note(self, reasons: list[str]) -> None:
        for reason in reasons:
            if reason not in self.unreadable:
                logger.warning("left out: %s", reason)
                self.unreadable[reason] = None
