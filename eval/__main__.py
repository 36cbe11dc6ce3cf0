"""`python -m eval`, `torchrun -m eval` and `accelerate launch -m eval` are `sd-vae eval`."""

import sys

from sd_vae.cli import main

raise SystemExit(main(["eval", *sys.argv[1:]]))
