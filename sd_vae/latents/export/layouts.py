"""What other trainers read: one `Layout` each, with what it holds and what it needs, as data.

Everything that decides whether a store can be exported stands here, so that a store that lacks something is refused
before a byte is written. Imports neither torch nor numpy. docs/exports.md is the specification.
"""

from dataclasses import dataclass
from typing import Literal

from sd_vae.errors import UserError

__all__ = ["LAYOUTS", "Draw", "Layout", "LayoutName", "Values", "find_layout"]

LayoutName = Literal[
    "kohya", "dit", "repa", "edm2", "edm2-zip", "mar", "lightningdit", "webdataset", "mds", "parquet", "comfyui"
]
Values = Literal["raw", "scaled"]
"""raw: z as the encoder gives it; scaled: (z - offset) * factor, as a diffusion model takes it."""
Draw = Literal["sample", "mode"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The conventions of one consumer."""

    title: str
    """Who reads it."""
    module: str
    """Module of this package with its `write` and `read`."""
    holds: Literal["one latent", "mean and logvar", "mean and std"] = "one latent"
    """What is kept of each posterior."""
    values: Values | None
    """raw or scaled; None where there is no convention, so that the user says which."""
    one_size: bool = True
    """Whether all latents must have one size."""
    num_channels: int | None = None
    """Channels that the consumer takes for granted."""
    square: bool = False
    """Whether height and width must be equal."""
    label: Literal["required", "optional", "unused"] = "unused"
    """Whether each latent needs a class."""
    mirrored: Literal["required", "taken", "left out"] = "left out"
    """What becomes of mirrored encodings."""
    several_views: bool = True
    """Whether a picture may have several crops."""

    @property
    def num_parts(self) -> int:
        """Tensors of C channels in each array: 2 where it holds moments."""
        return 1 if self.holds == "one latent" else 2


LAYOUTS: dict[LayoutName, Layout] = {
    "kohya": Layout(
        title="kohya-ss/sd-scripts, .npz beside each picture",
        module="kohya",
        values="raw",
        one_size=False,
        mirrored="taken",
        several_views=False,
    ),
    "dit": Layout(title="DiT and fast-DiT, .npy", module="dit", values="scaled", square=True, label="required"),
    "repa": Layout(
        title="REPA, vae-sd/ of mean-std .npy",
        module="edm2",
        holds="mean and std",
        values="raw",
        square=True,
        label="required",
    ),
    "edm2": Layout(
        title="EDM2, folder of mean-std .npy",
        module="edm2",
        holds="mean and std",
        values="raw",
        square=True,
        label="optional",
    ),
    "edm2-zip": Layout(
        title="EDM2, uncompressed zip of mean-std .npy",
        module="edm2",
        holds="mean and std",
        values="raw",
        square=True,
        label="optional",
    ),
    "mar": Layout(
        title="MAR, .npz of moments in class folders",
        module="mar",
        holds="mean and logvar",
        values="raw",
        label="required",
        mirrored="required",
    ),
    "lightningdit": Layout(
        title="LightningDiT, safetensors with latents_stats.pt",
        module="lightningdit",
        values="raw",
        square=True,
        label="required",
        mirrored="required",
    ),
    "webdataset": Layout(title="WebDataset, tars of .npy and .json", module="tars", values=None, one_size=False),
    "mds": Layout(
        title="mosaicml-streaming, MDS shards",
        module="mds",
        values="scaled",
        num_channels=4,
        one_size=False,
        square=True,
    ),
    "parquet": Layout(title="Hugging Face datasets, parquet with Array3D", module="parquet", values=None),
    "comfyui": Layout(title="ComfyUI, .latent", module="comfyui", values="raw", one_size=False),
}
"""Every layout by the name that `--format` takes."""


def find_layout(name: str) -> Layout:
    """Return the layout of a name.

    Raises:
        UserError: No layout has that name.
    """
    for known, layout in LAYOUTS.items():
        if known == name:
            return layout
    raise UserError(f"unknown export format {name!r}; choose one of: {', '.join(LAYOUTS)}.")
