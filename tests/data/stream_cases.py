"""Tars of grey pictures and the samples that a loader gives of them."""

import io
import itertools
import tarfile

import numpy as np

from sd_vae.data import open_training_source, training_loader
from sd_vae.data.config import DataConfig


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def grey_png(number):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.full((18, 20, 3), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def source_of(spec, seed=1, **settings):
    settings = {"size": 16, "num_workers": 0, "shuffle_window": 4, **settings}
    return open_training_source(DataConfig(train=spec, **settings), seed)


def batches(spec, num_batches, *, batch_size=3, seed=1, position=None, **settings):
    settings = {"size": 16, "num_workers": 0, "shuffle_window": 4, **settings}
    config = DataConfig(train=spec, **settings)
    loader = training_loader(
        open_training_source(config, seed), config, batch_size=batch_size, seed=seed, **(position or {})
    )
    return list(itertools.islice(loader, num_batches))


def samples(found):
    """(epoch, index) of each sample, in order."""
    return [pair for batch in found for pair in zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)]
