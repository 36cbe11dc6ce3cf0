"""`sd-vae app`: a page in the browser to play with a VAE."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import sd_vae
from sd_vae.cli import console
from sd_vae.cli.default_vae import parse_with_vae
from sd_vae.errors import UserError

__all__ = ["Args", "run"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Open a page to play with a VAE: drop a picture, see latents, reconstruction and error, move what is between.

    The page is served on this machine alone, and loads nothing from elsewhere. Ctrl-C ends it.
    """

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of a VAE, in any layout, or the name of one that ships; left out, `mini`."""
    host: str = "127.0.0.1"
    """Address to serve on; 0.0.0.0 lets everybody in who reaches this machine, without a password."""
    port: int = 7860
    """Port to serve on; 0 takes the first free one from 7860."""
    max_side: int = 512
    """Pictures are made smaller to this many pixels a side first, so that sliders answer soon."""
    browser: bool = False
    """Open a browser too."""
    config: str | None = None
    """Preset (sd1, sdxl, sd3, flux, mini), config.json or its folder, where the VAE brings none."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What to compute in."""


def run(argv: list[str]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: Gradio is missing, the port is taken, or as `load_vae`.
    """
    args = parse_with_vae(Args, argv, command="app")
    if args.max_side < 1:
        raise UserError(f"--max-side is {args.max_side}, it must be at least 1.")
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port is {args.port}, it must be from 0 to 65535.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

    from sd_vae.cli.app_page import Playground, build_page

    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=args.device)
    page = build_page(Playground(vae, args.max_side), Path(args.vae).name or args.vae)
    try:
        _, url, _ = page.launch(
            server_name=args.host,
            server_port=args.port or None,
            inbrowser=args.browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"cannot serve on {args.host}:{args.port} ({error}); choose another --port.") from None
    console.say(f"{url} (Ctrl-C ends it)")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
