"""A script: python encode_killed.py FOLDER encodes FOLDER/photos to FOLDER/stores/0, and again and again, killed.

Store 0 is made undisturbed, store N by a process that is killed before its step STRIDE * N: a step is a picture that is
encoded, or a call that changes the file system. FOLDER/N.txt has a line for each picture that it encoded.
"""

import os
import sys
from pathlib import Path

import torch
from synthetic_store import run_killed

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import PictureTransform, open_records
from sd_vae.latents.encode import EncodeConfig, encode
from sd_vae.latents.encoder import ViewEncoder

CONFIG = EncodeConfig(transform=PictureTransform(size=16, factor=2), shard_items=4, num_workers=0, num_parallel=1)
STRIDE = 3


def encode_noted(folder: Path) -> None:
    """Encode to a store, with a line for each picture."""
    notes = os.open(folder.parents[1] / f"{folder.name}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    plain = ViewEncoder.__call__

    def noted(encoder: ViewEncoder, views: list[torch.Tensor]) -> list[torch.Tensor | None]:
        os.write(notes, b"a picture\n")
        return plain(encoder, views)

    ViewEncoder.__call__ = noted
    encode(vae, records, folder, CONFIG)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    vae = AutoencoderKL.from_pretrained(root / "vae").eval()
    records = open_records(str(root / "photos"))
    encode(vae, records, root / "stores" / "0", CONFIG)  # imports what the children would import each for itself
    run_killed(encode_noted, root / "stores", STRIDE, (ViewEncoder, "__call__"))
