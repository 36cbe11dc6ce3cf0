"""The same encode on a local Ray, one of whose workers is killed at work."""

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from synthetic_store import contents

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import PictureTransform, open_records
from sd_vae.latents.encode import EncodeConfig, encode

NUM_PHOTOS = 60
CONFIG = EncodeConfig(transform=PictureTransform(size=16, factor=2), shard_items=2, num_workers=0, num_parallel=1)

has_ray = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not has_ray, reason='ray is not installed; pip install "sd-vae[ray]"')


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    import numpy as np
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(NUM_PHOTOS):
        noise = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02}.png")
    (folder / "30.png").write_bytes(b"")
    return folder


def descendants(of: int) -> list[int]:
    """Processes that this one started, and theirs."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [of]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def kill_a_worker(store: Path, killed: list[int]) -> None:
    """Wait for the first finished shard, then end the process that makes shards."""
    while len(list(store.glob("shard-*.json"))) < 2:
        time.sleep(0.005)
    for process in descendants(os.getpid()):
        try:
            title = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and b"ShardMaker" in title:
            os.kill(process, signal.SIGKILL)
            killed.append(process)
            return


@needs_ray
@pytest.mark.slow  # 40 s: Ray starts, and starts a worker again
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_encode_on_ray_survives_a_killed_worker(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    records = open_records(str(photos))
    encode(tiny_vae, records, tmp_path / "local", CONFIG)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray", killed), daemon=True)
    killer.start()

    done = encode(tiny_vae, records, tmp_path / "ray", CONFIG, engine="ray")

    killer.join(timeout=5)
    assert killed
    assert done.num_done >= NUM_PHOTOS
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
