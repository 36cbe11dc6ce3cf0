"""Attribute vectors: what tells the latents of one group of pictures from another's, and adding more or less of it.

    z + strength * (mean of the positive - mean of the negative)

With few pictures the difference of means is mostly a difference between these very pictures. Each direction therefore
says how well one half of the pictures, projected on the direction that the other half gives, is told apart.

Source: Larsen et al., "Autoencoding beyond pixels using a learned similarity metric", arXiv 1512.09300, section 3.2;
White, "Sampling Generative Networks", arXiv 1609.04468, section 4.

Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sd_vae.errors import UserError
from sd_vae.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Direction", "Latents", "direction", "load_direction", "save_direction"]

FORMAT, VERSION = "sd-vae direction", 1
TENSOR = "direction"

LEAST_PICTURES = 2
"""Pictures a group needs: one in each half."""


class Latents(Protocol):
    """Latents (C, h, w) that can be counted, and gone through more than once."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield them in order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """The way from one group of latents to another."""

    vector: Tensor
    """Mean of the positive minus mean of the negative, raw, float32: (C, h, w), or (C, 1, 1) where cells are pooled."""
    num_positive: int
    """Pictures that have it."""
    num_negative: int
    """Pictures that lack it."""
    separation: float
    """Probability that a positive picture lies further along than a negative one (AUROC), each measured by the
    direction of the half that it is not in; 0.5 is chance."""
    encoder: str | None = None
    """Fingerprint of the encoder whose latents these are."""

    def __call__(self, z: Tensor, strength: float) -> Tensor:
        """Return raw z (..., C, h, w) moved by so many times the way from negative to positive.

        Raises:
            UserError: z has other channels or cells.
        """
        expected = self.vector.shape[:1] if self.is_pooled else self.vector.shape
        found = z.shape[-3:-2] if self.is_pooled else z.shape[-3:]
        if tuple(found) != tuple(expected):
            raise UserError(
                f"the direction is of latents of shape {tuple(self.vector.shape)}, these are {tuple(z.shape[-3:])}; "
                "bring the pictures to its size, or make a pooled direction."
            )
        return z + strength * self.vector.to(z)

    @property
    def is_pooled(self) -> bool:
        """Whether it is the same in every cell."""
        return self.vector.shape[1:] == (1, 1)


def direction(
    positive: Latents,
    negative: Latents,
    *,
    pooled: bool = False,
    encoder: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Direction:
    """Return the way from the negative latents to the positive ones.

    Args:
        positive: Raw latents (C, h, w) of pictures that have the attribute; read twice, one at a time.
        negative: Of pictures that lack it.
        pooled: One vector for all cells: for pictures that do not lie on one another, and of any size. Otherwise one
            for each cell, for pictures that do, as aligned faces or digits.
        encoder: Fingerprint to keep with it.
        progress: Called with the latents read so far and their number, both passes counted.

    Raises:
        UserError: Fewer than 2 latents in a group, or, unless pooled, latents of several sizes.
    """
    total, num_done = 2 * (len(positive) + len(negative)), 0

    def read(group: Latents) -> Iterator[tuple[int, Tensor]]:
        nonlocal num_done
        for index, z in enumerate(group):
            yield index, z.double().mean(dim=(1, 2), keepdim=True) if pooled else z.double()
            num_done += 1
            if progress is not None:
                progress(num_done, total)

    sums_positive, sums_negative = (
        _sum_halves(name, group, read) for name, group in (("positive", positive), ("negative", negative))
    )
    _require_one_size("negative latent 0", sums_negative[0], sums_positive[0])
    of_halves = [
        ours / _num_in_half(positive, half) - theirs / _num_in_half(negative, half)
        for half, (ours, theirs) in enumerate(zip(sums_positive, sums_negative, strict=True))
    ]
    # Each picture is placed by the half that it is not in.
    placed = [
        [(index % 2, float((z * of_halves[1 - index % 2]).sum())) for index, z in read(group)]
        for group in (positive, negative)
    ]
    areas = [_auroc(*([place for side, place in places if side == half] for places in placed)) for half in (0, 1)]
    return Direction(
        vector=(_total(sums_positive) / len(positive) - _total(sums_negative) / len(negative)).float(),
        num_positive=len(positive),
        num_negative=len(negative),
        separation=sum(areas) / 2,
        encoder=encoder,
    )


def save_direction(path: Path | str, found: Direction) -> None:
    """Write a direction as safetensors: the tensor `direction`, raw z, and the figures in the metadata.

    Raises:
        UserError: The file cannot be written.
    """
    from safetensors.torch import save_file

    about = {
        "format": FORMAT,
        "version": VERSION,
        "num_positive": found.num_positive,
        "num_negative": found.num_negative,
        "separation": found.separation,
        "encoder": found.encoder,
    }
    with atomic_file(Path(path)) as temporary:
        save_file({TENSOR: found.vector.contiguous()}, temporary, metadata={"sd-vae": json.dumps(about)})


def load_direction(path: Path | str) -> Direction:
    """Return the direction in a file of `save_direction`.

    Raises:
        UserError: No such file, or no direction of this version in it.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("sd-vae", "{}"))
            vector = file.get_tensor(TENSOR) if TENSOR in file.keys() else None  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise UserError(f"there is no direction {path}; make one with sd-vae latents direction.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no direction ({error}); make one with sd-vae latents direction.") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT or vector is None or vector.dim() != 3:
        raise UserError(f"{path} holds no direction; make one with sd-vae latents direction.")
    if about.get("version") != VERSION:
        raise UserError(
            f"{path} is a direction of version {about.get('version')}, this sd-vae reads {VERSION}; make it anew."
        )
    missing = [name for name in ("num_positive", "num_negative", "separation", "encoder") if name not in about]
    if missing:
        raise UserError(f"{path} misses the key {missing[0]!r}; make it anew with sd-vae latents direction.")
    if not bool(vector.isfinite().all()):
        raise UserError(f"{path} holds values that are not finite; make it anew with sd-vae latents direction.")
    return Direction(
        vector=vector.float(),
        num_positive=about["num_positive"],
        num_negative=about["num_negative"],
        separation=about["separation"],
        encoder=about["encoder"],
    )


def _sum_halves(name: str, group: Latents, read: Callable[[Latents], Iterator[tuple[int, Tensor]]]) -> list[Tensor]:
    """Sums of a group's even and of its odd latents."""
    if len(group) < LEAST_PICTURES:
        raise UserError(f"there are {len(group)} {name} latents, at least {LEAST_PICTURES} are needed; give more.")
    sums: list[Tensor] = []
    for index, z in read(group):
        if sums:
            _require_one_size(f"{name} latent {index}", z, sums[0])
        if index < 2:
            sums.append(z)
        else:
            sums[index % 2] = sums[index % 2] + z
    return sums


def _total(halves: Sequence[Tensor]) -> Tensor:
    even, odd = halves
    return even + odd


def _num_in_half(group: Latents, half: int) -> int:
    return (len(group) + 1 - half) // 2


def _require_one_size(name: str, z: Tensor, other: Tensor) -> None:
    if z.shape != other.shape:
        raise UserError(
            f"{name} has shape {tuple(z.shape)}, others have {tuple(other.shape)}; encode all pictures at one size, or "
            "ask for a pooled direction."
        )


def _auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that one of the first is larger than one of the second; equal ones count half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))
