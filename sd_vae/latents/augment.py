"""Variants of pictures for training on few: drawn from the posterior, mixed with others of the label, moved.

    z = (1 - share) * mean + share * partner's mean + temperature * std * eps + sum of strength_k * direction_k

Each variant is a pure function of (seed, picture, number), whatever else is made. How far the posterior alone reaches
was the choice of the VAE's training: with a KL weight of 1e-6 it hardly varies, and `posterior_reach` says how much.

Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sd_vae.errors import UserError
from sd_vae.latents.direction import Direction
from sd_vae.latents.sample import generator_of

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.latents.dataset import LatentDataset

__all__ = ["AugmentConfig", "Variant", "augment", "posterior_reach", "variants"]

MAX_MEASURED = 256
"""Items that `posterior_reach` looks at."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to each picture."""

    per_image: int = 10
    """Variants of each picture."""
    strength: float = 1.0
    """Factor of the three that follow."""
    temperature: float = 1.0
    """Noise, in standard deviations of the posterior."""
    mix: float = 0.3
    """Largest share of another picture; the share is uniform from 0 to this."""
    directions: tuple[Direction, ...] = ()
    """Attributes that are added, each by a factor uniform between -1 and 1."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: Lists every value that is out of range.
        """
        problems = [
            f"{name} is {value}, it must be a finite number of at least 0"
            for name in ("strength", "temperature")
            if not 0.0 <= (value := getattr(self, name)) < float("inf")
        ]
        if self.per_image < 1:
            problems.append(f"per_image is {self.per_image}, it must be at least 1")
        if not 0.0 <= self.mix <= 1.0:
            problems.append(f"mix is {self.mix}, it must be in [0, 1]")
        elif not problems and self.mix * self.strength > 1.0:
            problems.append(f"mix is {self.mix} and strength {self.strength}, their product must be at most 1")
        if problems:
            raise UserError("cannot augment like this: " + "; ".join(problems) + ".")


@dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """A latent made from a picture's, and how."""

    index: int
    """Number of the item."""
    number: int
    """Number of the variant, from 0."""
    z: Tensor
    """Raw latent (C, h, w), float32."""
    partner: int | None
    """Item that it was mixed with."""
    share: float
    """Share of the partner."""
    strengths: tuple[float, ...]
    """How far it was moved along each direction."""


def augment(
    mean: Tensor,
    std: Tensor | None = None,
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
    partner: Tensor | None = None,
    share: float = 0.0,
    directions: Sequence[Direction] = (),
    strengths: Sequence[float] = (),
) -> Tensor:
    """Return one variant of a latent, raw z (C, h, w), float32 on the CPU.

    Args:
        mean: The posterior's mean (C, h, w).
        std: Its standard deviation; None where it is not known, which is as 0.
        generator: Source of the noise, on the CPU.
        temperature: Factor of the standard deviation.
        partner: Another latent to mix with, of the same shape.
        share: Its share.
        directions: Attributes to add.
        strengths: How much of each.

    Raises:
        UserError: The partner has another shape, or a direction is of other latents.
    """
    z = mean.float()
    if partner is not None:
        if partner.shape != mean.shape:
            raise UserError(
                f"the partner has shape {tuple(partner.shape)}, the latent {tuple(mean.shape)}; mix equal sizes."
            )
        z = z.lerp(partner.float(), share)
    if std is not None:
        z = z + temperature * std.float() * torch.randn(z.shape, generator=generator)
    for move, strength in zip(directions, strengths, strict=True):
        z = move(z, strength)
    return z


def variants(dataset: LatentDataset, labels: Sequence[Any] | None, config: AugmentConfig) -> Iterator[Variant]:
    """Yield the variants of every item of a store, those of one item together.

    Args:
        dataset: Items with `content="moments"`, or of a store that holds none.
        labels: Label of each item: a partner has the same one. None mixes any with any. In both cases only latents of
            one size are mixed; an item without a partner stays unmixed.
        config: What is done.

    Raises:
        UserError: Temperature is not 0 and the store has no posterior, or as `augment`.
    """
    if config.temperature * config.strength and dataset.content != "moments":
        raise UserError(
            f"{dataset.folder} holds content {dataset.content}, which has no posterior to draw from; encode moments, "
            "or set temperature to 0."
        )
    keys = [
        (str(label), *size) for label, size in zip(labels or [None] * len(dataset), dataset.sizes.tolist(), strict=True)
    ]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return _variants(dataset, [groups[key] for key in keys], config)


def _variants(dataset: LatentDataset, groups: Sequence[list[int]], config: AugmentConfig) -> Iterator[Variant]:
    for index, group in enumerate(groups):
        mean, std = _posterior(dataset, index)
        for number in range(config.per_image):
            generator = generator_of(config.seed, "augment", index, number)
            # Always drawn, so that the draws of one kind do not depend on whether another is on.
            chosen, share, *factors = torch.rand(2 + len(config.directions), generator=generator).tolist()
            share *= config.mix * config.strength
            others = [other for other in group if other != index] if share else []
            partner = others[int(chosen * len(others))] if others else None
            strengths = tuple((2.0 * factor - 1.0) * config.strength for factor in factors)
            z = augment(
                mean,
                std,
                generator=generator,
                temperature=config.temperature * config.strength,
                partner=None if partner is None else _posterior(dataset, partner)[0],
                share=share,
                directions=config.directions,
                strengths=strengths,
            )
            share = 0.0 if partner is None else share
            yield Variant(index=index, number=number, z=z, partner=partner, share=share, strengths=strengths)


def posterior_reach(dataset: LatentDataset) -> float | None:
    """Return the posterior's standard deviation over that of z, root mean squares over the first 256 items.

    None where the store has no posterior.
    """
    if dataset.content != "moments":
        return None
    own, means = [], []
    for index in range(min(len(dataset), MAX_MEASURED)):
        mean, std = _posterior(dataset, index)
        assert std is not None
        own.append(std.square().mean())
        means.append(mean.flatten())
    spread = torch.cat(means).var(correction=0)
    return float((torch.stack(own).mean() / spread).sqrt())


def _posterior(dataset: LatentDataset, index: int) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation (C, h, w) of an item."""
    values = dataset.sample(index)
    if dataset.content != "moments":
        return values, None
    mean, logvar = values.chunk(2)
    return mean, (0.5 * logvar).exp()
