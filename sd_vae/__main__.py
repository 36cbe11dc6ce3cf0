"""`python -m sd_vae` is `sd-vae`."""

from sd_vae.cli import main

raise SystemExit(main())
