"""`evaluate`: photos through VAEs and back, measured as 8-bit pictures by a named protocol, side by side.

The whole way of a photo is here. It becomes upright 8-bit RGB, is resized and cropped if the protocol says so, and goes
through every VAE: to [-1, 1], padded by reflection to the model's factor, encoded, decoded, cropped back, clamped, and
rounded to 8 bits. Then it is compared with the photo, one photo at a time in float64, and forgotten. Several processes
take a stretch of the photos each; sums are exact, so their number changes nothing. The same photos, weights and
protocol give the same numbers on the same machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd_vae.errors import UnreachableError, UserError
from sd_vae.latents.processes import Processes

from .deeper import Deeper
from .fid import PHOTOS, FeatureFile, frechet_distances
from .measures import Perceptual, build_measures
from .models import require_autoencoder
from .photos import Data, fit_photo, open_photos, photo_digest, read_photo
from .pictures import error_map, latent_channels, latent_colours
from .probes import Trial
from .protocols import Protocol, get_protocol
from .results import Evaluation, PhotoSize, ReconPictures, Reject
from .roundtrip import evaluating
from .routes import BoxRoute, CodecRoute, Passed, Route, VaeRoute
from .shares import Share
from .summary import summarise

__all__ = ["Perceptual", "evaluate"]

NOTHING_DEEPER = Deeper()


def evaluate(
    vaes: Mapping[str, Any] | Sequence[Any],
    data: Data,
    *,
    protocol: str | Protocol = "pixels",
    size: int | None = None,
    metrics: Sequence[str] | None = None,
    weights: Mapping[str, str] | None = None,
    perceptual: Perceptual | None = None,
    box_blocks: Sequence[int] = (),
    codecs: Sequence[str] = (),
    deeper: Deeper = NOTHING_DEEPER,
    strict: bool = False,
    max_pictures: int = 8,
    worst: int = 0,
    on_pictures: Callable[[str, Mapping[str, ReconPictures]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Return how well VAEs reconstruct photos, and how they compare.

    Args:
        vaes: Models by name, or a sequence of them, then called `model 1`, `model 2`, ...; any of
            `eval.models.AUTOENCODERS`. Each runs on its own device and in its own dtype, in eval mode, and is left in
            the mode it came in. The first is compared with all other rows.
        data: A folder (searched below too), a parquet file or folder, WebDataset tars, `hf://DATASET[:SPLIT]`, a file,
            a sequence of files and folders, or named pictures.
        protocol: Name of one of `eval.protocols.PROTOCOLS`, or a protocol of your own.
        size: Another size than the protocol's; the report then calls it so.
        metrics: What to measure instead of the protocol's choice.
        weights: Network (vgg, alex, squeeze, inception) to the file of its weights; the torch hub cache for others.
        perceptual: A perceptual distance of your own to measure too, under its own name.
        box_blocks: Sides in pixels of block averages that stand as rows beside the models.
        codecs: JPEG, WebP: rows that spend as many bits on each photo as the first model's latents at 16 bits a value.
        deeper: What to ask beside the metrics: more round trips, other sizes, half precision, tiling.
        strict: Stop at the first photo that cannot be read or is too small, instead of listing it.
        max_pictures: How many photos' pictures to keep in the result, the first ones.
        worst: How many more to keep: those that are worst in the first metric of the first row.
        on_pictures: Called with a photo's name and its pictures by row, as soon as they exist, for every photo.
        progress: Called with the number of photos done and their total, before the first and after each.
        processes: The processes that share the work; each returns the whole result.

    Returns:
        Numbers per photo, their means with intervals, comparisons, latent statistics, and some photos' pictures.

    Raises:
        UserError: No models or photos, a model that is not for RGB, two rows of one name, an unknown protocol or
            metric, missing weights of a metric, or no photo that can be evaluated.
        UnreachableError: The network does not bring a photo: what is there is not judged without it.
    """
    processes = processes or Processes()
    chosen = get_protocol(protocol, size=size, metrics=metrics)
    models = _named(vaes)
    routes: list[Route] = [VaeRoute(name, vae, chosen) for name, vae in models.items()]
    routes += [CodecRoute(codec) for codec in codecs]
    routes += [BoxRoute(block) for block in box_blocks]
    _require_distinct([route.name for route in routes])
    photos = open_photos(data)
    device = next(next(iter(models.values())).parameters()).device
    measures = build_measures(chosen, weights=weights, perceptual=perceptual, device=device)
    probes = deeper.probes(models, chosen, measures)
    features = [
        (route, network, FeatureFile(metric, route, network.num_features))
        for metric, network in measures.features.items()
        for route in (PHOTOS, *(route.name for route in routes))
    ]

    total = photos.num_photos
    start, stop = (total * rank // processes.count for rank in (processes.rank, processes.rank + 1))
    share = Share.of([route.name for route in routes], num_pictures=max_pictures, num_worst=worst)
    with evaluating(list(models.values())):
        for done, photo in enumerate(photos.read(start, stop)):
            if progress:
                progress(done, stop - start)
            try:
                original = read_photo(photo)
                x = fit_photo(original, chosen.size, chosen.resize_filter)
                measures.require_size(x)
            except UnreachableError:
                raise
            except UserError as error:
                if strict:
                    raise UserError(f"{photo.name}: {error}") from error
                share.rejects.append(Reject(name=photo.name, reason=f"{photo.name}: {error}"))
                continue
            passed = _pass_all(routes, x, photo.name)
            recons = {name: one.recon for name, one in passed.items()}
            share.digests[photo.name] = photo_digest(original)
            share.sizes.append(PhotoSize(name=photo.name, width=x.width, height=x.height))
            for name, one in passed.items():
                share.add(name, photo.name, measures.of(one.recon, x), one)
            for route, network, file in features:
                file.append(network(_bytes(recons.get(route, x))).cpu().numpy())
            share.probed.append([probe(Trial(photo, original, x, recons)) for probe in probes])
            score = next(iter(share.results.values()))[-1].metrics
            if on_pictures or share.gallery.wants(score, measures.table):
                pictures = {name: _draw(one, x) for name, one in passed.items()}
                share.gallery.offer(start + done, photo.name, pictures, score, measures.table)
                if on_pictures:
                    on_pictures(photo.name, pictures)
        if progress:
            progress(stop - start, stop - start)

    found = Share.merged(processes.gather(share))
    if not found.sizes:
        reason = found.rejects[0].reason
        raise UserError(f"none of the {len(found.rejects)} photos can be evaluated; the first: {reason}")
    distances = processes.from_first(frechet_distances([file.gathered(processes) for *_, file in features]))
    return summarise(routes, chosen, measures, found, distances, probes)


def _named(vaes: Any) -> dict[str, Any]:
    """The models by name, checked."""
    if not isinstance(vaes, Mapping | Sequence) or isinstance(vaes, str):
        raise UserError(f"vaes is a {type(vaes).__name__}, it must be a list or a dict of models; pass [vae].")
    models = dict(vaes) if isinstance(vaes, Mapping) else {f"model {n}": vae for n, vae in enumerate(vaes, start=1)}
    if not models:
        raise UserError("there is no model to evaluate; pass at least one VAE.")
    for name, vae in models.items():
        require_autoencoder(name, vae)
    return models


def _require_distinct(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"two rows have one name among {', '.join(names)}; give every model and block once.")


def _pass_all(routes: Sequence[Route], x: Image.Image, photo: str) -> dict[str, Passed]:
    """A picture by every route; codecs may spend as many bits as the first one."""
    passed: dict[str, Passed] = {}
    for route in routes:
        budget = next(iter(passed.values())).num_bits if passed else None
        passed[route.name] = route(x, photo, budget)
    return passed


def _bytes(picture: Image.Image) -> Tensor:
    """(1, 3, H, W), uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def _draw(passed: Passed, x: Image.Image) -> ReconPictures:
    """Everything to look at in one photo and its reconstruction."""
    z = passed.z
    return ReconPictures(
        original=x,
        recon=passed.recon,
        error=error_map(passed.recon, x),
        latent_channels=None if z is None else latent_channels(z),
        latent_colours=None if z is None or z.shape[1] < 4 else latent_colours(z),
    )
