"""`sd-vae latents stats`: what a store's latents are like, and the scale that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sd_vae.cli import console
from sd_vae.cli.stores import load_encoder, require_encoder, shard_progress

if TYPE_CHECKING:
    from sd_vae.latents import LatentStatistics, LatentStore
    from sd_vae.latents.statistics import Estimate

__all__ = ["Args", "run"]

_WIDEST_COVARIANCE = 6  # channels; --json has them all


@dataclass(frozen=True)
class Args:
    """Measure a store: mean, std, covariance, KL, active units, and the scale that gives its latents unit variance.

    Each figure has an interval that counts pictures, not cells, as observations.
    """

    store: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Folder of latents."""
    confidence: float = 0.95
    """Probability with which an interval holds the true figure."""
    write: str | None = None
    """Folder of the VAE that made the store: put the scale into its config.json."""
    convention: Literal["scale", "shift", "channels"] = "scale"
    """What --write sets. scale: scaling_factor alone, as Stable Diffusion 1, 2 and XL read it; shift: shift_factor too,
    as SD 3 and FLUX.1 do; channels: latents_mean and latents_std."""
    new_encoder: bool = False
    """The encoder was trained anew, so no diffusion model depends on the scale that --write replaces."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the action.

    Args:
        argv: Its arguments.

    Raises:
        UserError: As `sd_vae.latents.measure`, `load_vae` and `sd_vae.latents.scale.write_scale`; or --write names a
            VAE with another encoder.
    """
    args = console.parse(Args, argv, command="latents stats")

    from sd_vae.latents import LatentStore, measure
    from sd_vae.latents.scale import kept_scale, scale_fields, write_scale

    store = LatentStore.open(args.store)
    if args.write is not None:
        require_encoder(store, load_encoder(store, args.write, None), args.write)
    with shard_progress(store, "measuring") as progress:
        found = measure(args.store, confidence=args.confidence, progress=progress)
    note = kept_scale(store.description.vae)
    written: dict[str, Any] = {}
    if args.write is not None:
        fields = scale_fields(found, args.convention)
        before, after = write_scale(args.write, fields, new_encoder=args.new_encoder)
        written = {name: [getattr(before, name), getattr(after, name)] for name in fields}
    if args.json:
        suggested = {"latents_mean": found.latents_mean, "latents_std": found.latents_std, "keep": note}
        console.print_json(_plain(found) | suggested | {"written": written})
    else:
        _print_channels(found)
        _print_covariance(found)
        console.print_fields(_fields(found, store))
    if note and not args.write:
        console.say(f"note: {note}.")
    if written:
        _say_written(args.write or "", written)


def _plain(found: LatentStatistics) -> dict[str, Any]:
    """The figures as JSON's own values; an estimate is an object of value, low, high and n."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return value._asdict()
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {name: plain(value) for name, value in asdict(found).items()}


def _print_channels(found: LatentStatistics) -> None:
    """The table of the channels."""
    console.print_table(
        f"raw z by channel, with {found.confidence:.0%} intervals over {found.num_pictures:,} pictures",
        ["channel", "mean", "std", "KL (nats)", "active"],
        [
            [str(index), _show(one.mean), _show(one.std), _show(one.kl), _active(one.is_active)]
            for index, one in enumerate(found.channels)
        ],
    )


def _print_covariance(found: LatentStatistics) -> None:
    """The table of covariances, where it is narrow enough to read."""
    if len(found.channels) > _WIDEST_COVARIANCE:
        return
    console.print_table(
        "covariance of z",
        ["channel", *map(str, range(len(found.channels)))],
        [[str(index), *map(_show, row)] for index, row in enumerate(found.covariance)],
    )


def _fields(found: LatentStatistics, store: LatentStore) -> dict[str, str]:
    """What follows from the figures, as text by name."""
    holds = {
        "moments": "moments; z includes the posterior's own variance",
        "mode": "modes; their figures leave the posterior's own variance out",
        "sample": "samples",
    }[found.content]
    fields = {
        "store": f"{found.num_items:,} latents of {found.num_pictures:,} pictures, {found.num_cells:,} cells; {holds}",
        "its scale": ", ".join(
            f"{name} {value}"
            for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
            if (value := getattr(store.description.vae, name)) is not None
        ),
    }
    if found.num_active is not None:
        fields["active"] = f"{found.num_active} of {len(found.channels)} channels"
    if found.kl is not None:
        fields["KL"] = f"{_show(found.kl)} nats a latent element"
    return fields | {
        "scaling_factor": f"{_show(found.scaling_factor)}, 1 / std over all channels",
        "shift_factor": f"{_show(found.shift_factor)}, mean over all channels",
        "latents_mean": ", ".join(f"{mean:.6g}" for mean in found.latents_mean),
        "latents_std": ", ".join(f"{std:.6g}" for std in found.latents_std),
    }


def _say_written(vae: str, written: Mapping[str, list[Any]]) -> None:
    changes = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in written.items() if old != new)
    console.say(f"{vae}/config.json: {changes or 'unchanged'}.")
    if changes:
        console.say(
            "the store still describes the scale that it was made with, and LatentDataset(scaled=True) gives latents "
            "of that; scale raw z by the VAE's config instead, or encode again."
        )


def _show(estimate: Estimate | None) -> str:
    """0.1234 ±0.0056: half of the wider side, to two digits."""
    if estimate is None:
        return "-"
    width = max(estimate.high - estimate.value, estimate.value - estimate.low)
    if not 0 < width < float("inf"):
        return f"{estimate.value:.4g} ±{'0' if width == 0 else '∞'}"
    return f"{estimate.value:.4g} ±{width:.2g}"


def _active(is_active: bool | None) -> str:
    return {True: "yes", False: "no", None: "-"}[is_active]
