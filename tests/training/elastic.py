"""Run by torchrun: a run that notes which pictures each process trains on and is asked to stop after some steps.

elastic.py NUM_PROCESSES STOP_AFTER NOTES (RECIPE | RUN)
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.config import load_recipe
from training.trainer import Trainer, resume

Sample = tuple[int, int]
"""Epoch and number of a picture."""


def note_samples(trainer: type[Trainer], notes: list[list[Sample]], num_processes: int, stop_after: int) -> None:
    """Make every step note its samples, and one send itself the signal that a cluster sends."""
    step = trainer._step

    def noted(self: Trainer, batches: Iterator[Any]) -> Any:
        assert self.accelerator.num_processes == num_processes
        if self.progress.step + 1 == stop_after and self._is_main:
            # As torchrun and clusters do: from elsewhere, and the workers of the loader get it too.
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], check=True, start_new_session=True)
        return step(self, _noting(batches, notes))

    trainer._step = noted  # type: ignore[method-assign]


def _noting(batches: Iterator[Any], notes: list[list[Sample]]) -> Iterator[Any]:
    for batch in batches:
        notes.append(list(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)))
        yield batch


if __name__ == "__main__":
    num_processes, stop_after, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4])
    found: list[list[Sample]] = []
    note_samples(Trainer, found, num_processes, stop_after)
    try:
        resume(place) if place.is_dir() else Trainer(load_recipe(place)).fit()
    except KeyboardInterrupt as interrupt:
        logging.warning(interrupt)
    finally:
        (Path(sys.argv[3]) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
