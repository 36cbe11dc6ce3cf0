"""What the commands around anomalies share: the pictures of a data set, LPIPS, a device, a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from sd_vae.data import Picture, PictureTransform, Records, Reject
    from sd_vae.latents.anomaly.fitting import Progress
    from sd_vae.losses.perceptual import LPIPS

__all__ = ["Pictures", "bar", "choose_device", "load_lpips", "memory_errors"]

MAX_LISTED = 3
"""Pictures named on standard error that could not be used."""


class Pictures:
    """The usable pictures of a data set in their order, as often as they are asked for; keeps why others are not.

    Args:
        records: The data set.
        transform: What is cut from each picture.
        num_workers: Processes that decode.
        strict: Stop at the first picture that cannot be used.
        limit: Records to read at most.
    """

    def __init__(
        self, records: Records, transform: PictureTransform, *, num_workers: int, strict: bool, limit: int | None = None
    ) -> None:
        self.records = records
        self.transform = transform
        self.rejects: dict[int | None, Reject] = {}
        self._num_workers = num_workers
        self._strict = strict
        self._limit = limit

    @property
    def num_records(self) -> int | None:
        """Records that are read; None where nobody knows yet."""
        number = self.records.num_records
        return number if number is None or self._limit is None else min(number, self._limit)

    def __iter__(self) -> Iterator[Picture]:
        """Yield what can be used.

        Raises:
            UserError: A picture cannot be used where `strict`, or a file is gone.
        """
        from sd_vae.data import Picture, picture_loader

        found = picture_loader(self.records, self.transform, stop=self._limit, num_workers=self._num_workers)
        for item in found:
            if isinstance(item, Picture):
                yield item
                continue
            if self._strict:
                raise UserError(f"{item.source} cannot be used, {describe(item)}; mend it, or go without --strict.")
            self.rejects[item.position] = item

    def tell_rejects(self, say: Callable[[str], None]) -> None:
        """Say what could not be used."""
        for reject in list(self.rejects.values())[:MAX_LISTED]:
            say(f"left out: {reject.source}, {describe(reject)}.")
        if len(self.rejects) > MAX_LISTED:
            say(f"left out: {len(self.rejects) - MAX_LISTED} more pictures that cannot be used.")


def describe(reject: Reject) -> str:
    """Return why a picture is not used."""
    return f"{reject.reason}: {reject.detail.rstrip('.')}"


def load_lpips(net: str | None, backbone: str | None) -> LPIPS | None:
    """Return LPIPS on a network with real weights; None for no network.

    Raises:
        UserError: The weights are missing, or given for no network.
    """
    if net is None:
        if backbone is not None:
            raise UserError(f"a file of weights is given, {backbone}, but no LPIPS network that they are of; name it.")
        return None
    from sd_vae.losses.perceptual import LPIPS

    return LPIPS(net, backbone)


def choose_device(name: str) -> str:
    """Return the device that `auto` stands for."""
    import torch

    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


@contextmanager
def bar() -> Iterator[Progress]:
    """A bar on standard error with rate and time left; yields what is told (stage, done, total)."""
    from tqdm import tqdm

    with tqdm(unit="", file=sys.stderr, smoothing=0.05) as shown:

        def show(stage: str, done: int, total: int | None) -> None:
            if shown.desc.removesuffix(": ") != stage:
                shown.reset(total)
                shown.set_description(stage, refresh=False)
            shown.total = total
            shown.update(done - shown.n)

        yield show


@contextmanager
def memory_errors(device: str) -> Iterator[None]:
    """Turn a device that is out of memory into what the user can do about it."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} is out of memory: {str(error).splitlines()[0].rstrip('.')}; make pictures smaller with --size, "
            "or use --dtype bfloat16 or --device cpu."
        ) from error
