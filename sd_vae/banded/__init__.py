"""Encoder and decoder in row bands: exact, with half the memory or less, and a plan of it. `sd_vae.tiling` opens it."""
