"""`python -m training` and `accelerate launch -m training` are `sd-vae train`."""

import sys

from sd_vae.cli import main

raise SystemExit(main(["train", *sys.argv[1:]]))
