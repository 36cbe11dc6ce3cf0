"""The page of `sd-vae app`: what happens to a picture, its latents, and what one does to them.

`Playground` is the page's arithmetic, pictures to pictures, without a browser; `build_page` lays it out in Gradio.

Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.latents.interpolate import PathName

__all__ = ["MAX_ROUND_TRIPS", "Looked", "Playground", "build_page"]

MAX_ROUND_TRIPS = 20
"""Most round trips that the page offers."""

MAX_SLIDERS = 16
"""Channels that get a slider; of more, the first."""

TILE_ENLARGEMENT = 4
"""Pixels a latent cell, along each side, where latents are shown."""

TITLE = "What a VAE keeps"


class Looked(NamedTuple):
    """A picture and what became of it."""

    picture: Image.Image
    """As it was encoded."""
    z: Tensor
    """Its raw latents (1, C, h, w): the posterior's mean."""
    recon: Image.Image
    """Decoded again."""
    error: Image.Image
    """Where that differs."""
    latents: Image.Image
    """The channels of z as grey tiles."""
    facts: dict[str, str]
    """Sizes, PSNR, SSIM, KL."""


class Playground:
    """A VAE to play with.

    Args:
        vae: The VAE.
        max_side: Larger pictures are made smaller first, so that a slider answers soon, in pixels.
    """

    def __init__(self, vae: AutoencoderKL, max_side: int = 512) -> None:
        self.vae = vae
        self.max_side = max_side
        self.num_channels = int(vae.config.latent_channels)

    def look(self, picture: Image.Image) -> Looked:
        """Return what the VAE makes of a picture.

        Args:
            picture: Of any mode and size.
        """
        from PIL import Image

        from eval.metrics import psnr_db, ssim
        from eval.pictures import error_map, latent_channels
        from eval.roundtrip import encode_picture

        picture = self._fit(picture)
        encoded = encode_picture(self.vae, picture)
        assert encoded.posterior is not None, "an AutoencoderKL has a posterior"
        z = encoded.z.float().cpu()
        recon = self.decode(z, picture.size)
        tiles = latent_channels(z)
        tiles = tiles.resize([TILE_ENLARGEMENT * side for side in tiles.size], Image.Resampling.NEAREST)
        facts = {
            "pixels": f"{picture.width} x {picture.height}",
            "latents": " x ".join(str(size) for size in z.shape[1:]),
            "numbers kept": f"1 of {3 * picture.width * picture.height / z.numel():.1f}",
            "PSNR": f"{psnr_db(recon, picture):.2f} dB",
            "KL to N(0, I)": f"{float(encoded.posterior.kl().mean()) / z[0].numel():.2f} nats a latent element",
        }
        if min(picture.size) >= 11:  # SSIM's window
            facts["SSIM"] = f"{ssim(recon, picture):.3f}"
        return Looked(picture, z, recon, error_map(recon, picture), tiles, facts)

    def decode(self, z: Tensor, size: tuple[int, int]) -> Image.Image:
        """Return raw latents (1, C, h, w) as a picture of (width, height) pixels."""
        from eval.roundtrip import decode_picture

        return decode_picture(self.vae, z.to(self.vae.device, self.vae.dtype), size)

    def shift_channels(self, looked: Looked, offsets: Sequence[float]) -> Image.Image:
        """Return the picture of latents whose channels were moved.

        Args:
            looked: A picture.
            offsets: What is added to each channel, in standard deviations of it in this picture; further ones stay.
        """
        z = looked.z.clone()
        spreads = z.std(dim=(0, 2, 3), correction=0)
        for channel, offset in enumerate(offsets):
            z[:, channel] += offset * spreads[channel]
        return self.decode(z, looked.picture.size)

    def between(self, looked: Looked, other: Image.Image, place: float, path: PathName = "slerp") -> Image.Image:
        """Return what lies between two pictures in latent space.

        Args:
            looked: The first.
            other: The second, cut and resized to the first one's size.
            place: 0 is the first, 1 the second.
            path: lerp or slerp.
        """
        import torch
        from PIL import ImageOps

        from eval.roundtrip import encode_picture
        from sd_vae.images import to_rgb
        from sd_vae.latents.interpolate import blend

        fitted = ImageOps.fit(to_rgb(other), looked.picture.size)
        end = encode_picture(self.vae, fitted).z
        z = blend(self.vae, looked.z[0], end[0], torch.tensor([place]), path)
        return self.decode(z, looked.picture.size)

    def round_trips(self, looked: Looked, count: int) -> tuple[Image.Image, list[float]]:
        """Return a picture after so many encodes and decodes, 8 bits in between, and the PSNR in dB after each."""
        from eval.metrics import psnr_db
        from eval.roundtrip import encode_picture

        recon, levels = looked.recon, [psnr_db(looked.recon, looked.picture)]
        for _ in range(count - 1):
            recon = self.decode(encode_picture(self.vae, recon).z, recon.size)
            levels.append(psnr_db(recon, looked.picture))
        return recon, levels

    def _fit(self, picture: Image.Image) -> Image.Image:
        from PIL import Image

        from sd_vae.images import to_rgb

        fitted = to_rgb(picture)
        fitted.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        return fitted


def build_page(playground: Playground, name: str) -> Any:
    """Return the page as `gradio.Blocks`.

    Args:
        playground: What it shows.
        name: What to call the VAE.

    Raises:
        UserError: Gradio is missing.
    """
    try:
        import gradio as gr
    except ImportError:
        raise UserError('the page needs Gradio; pip install "sd-vae[app]".') from None

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        """A mistake of the user's is shown on the page, in its own words."""

        @wraps(function)
        def call(*values: Any) -> Any:
            try:
                return function(*values)
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from None

        return call

    def require(looked: Looked | None) -> Looked:
        if looked is None:
            raise UserError("there is no picture yet; drop one at the top.")
        return looked

    def look(picture: Image.Image | None) -> tuple[Any, ...]:
        if picture is None:
            return None, None, None, None, None, "", None, None, None, ""
        found = playground.look(picture)
        facts = "\n".join(f"- {key}: **{value}**" for key, value in found.facts.items())
        shown = (found.picture, found.recon, found.error, found.latents)
        return found, *shown, facts, found.recon, found.recon, found.recon, ""

    def shift(looked: Looked | None, *offsets: float) -> Image.Image:
        return playground.shift_channels(require(looked), offsets)

    def between(looked: Looked | None, other: Image.Image | None, place: float, path: PathName) -> Image.Image:
        if other is None:
            raise UserError("there is no second picture yet; drop one beside the slider.")
        return playground.between(require(looked), other, place, path)

    def trips(looked: Looked | None, count: float) -> tuple[Image.Image, str]:
        recon, levels = playground.round_trips(require(looked), int(count))
        return recon, "PSNR in dB after each trip: " + ", ".join(f"{level:.2f}" for level in levels)

    show = partial(gr.Image, interactive=False, format="png", buttons=["fullscreen", "download"])
    with gr.Blocks(title=f"{TITLE}: {name}", analytics_enabled=False) as page:
        looked = gr.State(None)
        gr.Markdown(f"# {TITLE}\n{name}. Pictures above {playground.max_side} pixels are made smaller first.")
        with gr.Row():
            given = gr.Image(type="pil", image_mode=None, label="Drop a picture", elem_id="given")
            facts = gr.Markdown(elem_id="facts")
        with gr.Tab("Reconstruction"):
            with gr.Row():
                picture = show(label="Picture", elem_id="picture")
                recon = show(label="Reconstruction", elem_id="recon")
                error = show(label="Error, bright from 64 levels", elem_id="error")
            latents = show(label="Latents, a tile a channel", elem_id="latents")
        with gr.Tab("Channels"), gr.Row():
            with gr.Column():
                sliders = [
                    gr.Slider(
                        -3,
                        3,
                        0,
                        step=0.25,
                        label=f"Channel {channel}, standard deviations",
                        elem_id=f"channel{channel}",
                    )
                    for channel in range(min(playground.num_channels, MAX_SLIDERS))
                ]
                reset = gr.Button("Back to 0", elem_id="reset")
            shifted = show(label="Decoded", elem_id="shifted")
        with gr.Tab("Interpolation"), gr.Row():
            with gr.Column():
                other = gr.Image(type="pil", image_mode=None, label="Drop a second picture", elem_id="other")
                place = gr.Slider(0, 1, 0.5, step=0.05, label="From the first to the second", elem_id="place")
                path = gr.Radio(["slerp", "lerp"], value="slerp", label="Path")
            blended = show(label="Between them", elem_id="blended")
        with gr.Tab("Round trips"), gr.Row():
            with gr.Column():
                count = gr.Slider(1, MAX_ROUND_TRIPS, 5, step=1, label="Encodes and decodes", elem_id="count")
                go = gr.Button("Go", variant="primary", elem_id="go")
                levels = gr.Markdown(elem_id="levels")
            tripped = show(label="After them", elem_id="tripped")

        results = [looked, picture, recon, error, latents, facts, shifted, blended, tripped, levels]
        given.change(told(look), given, results, concurrency_limit=1)
        for slider in sliders:
            slider.release(told(shift), [looked, *sliders], shifted, trigger_mode="always_last", concurrency_limit=1)
        reset.click(lambda: [0.0] * len(sliders), None, sliders).then(told(shift), [looked, *sliders], shifted)
        blend_inputs = [looked, other, place, path]
        place.release(told(between), blend_inputs, blended, trigger_mode="always_last", concurrency_limit=1)
        for part in (other, path):
            part.input(told(between), blend_inputs, blended, concurrency_limit=1)
        go.click(told(trips), [looked, count], [tripped, levels], concurrency_limit=1)
    return page
