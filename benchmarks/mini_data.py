"""Pack the photos that `mini` is trained on: one in twenty held out, diverse folders repeated, as parquet files.

    python -m benchmarks.mini_data ../shared/data/photos_train --out ../mini_data

writes `train/` and `holdout/`, each of parquet files that `sd-vae train --data.train` reads. Which photos are held out
follows from their names alone, so it is the same on every machine; choices are made on them and nothing is on Kodak.
A repeated photo stands in the table again and in the file once: its rows share an entry of the column's dictionary.
"""

import argparse
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

from sd_vae.errors import UserError
from sd_vae.files import atomic_file, make_folder
from sd_vae.images import list_images

__all__ = ["REPEATS", "is_held_out", "pack", "write_tables"]

HOLDOUT = 20
"""One photo in so many is held out."""
REPEATS = {"cid22": 3, "elementary": 3}
"""Times that the photos of a folder are trained on for every time those of the others are."""
MIB = 2**20


def is_held_out(name: str) -> bool:
    """Whether a photo is kept from training, by the hash of its `FOLDER/FILE`."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HOLDOUT == 0


def pack(photos: Path, out: Path, *, repeats: Mapping[str, int] = REPEATS, max_mib: int = 48) -> dict[str, int]:
    """Write the photos of a folder's sub-folders as tables to train on and to hold out.

    Args:
        photos: Folder of folders of pictures.
        out: Folder to write, new.
        repeats: Rows that a training photo gets, by its folder; 1 by default.
        max_mib: Size of a file at most, so that it can be carried where files must be small.

    Returns:
        Rows to train on and rows held out.

    Raises:
        UserError: No pictures, `out` exists, or `repeats` names a folder that is not there.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another place.")
    named = {f"{path.parent.name}/{path.name}": path for path in list_images(photos)}
    unknown = repeats.keys() - {path.parent.name for path in named.values()}
    if unknown:
        raise UserError(f"{photos} has no folder {', '.join(sorted(unknown))} to repeat; check its name.")
    held_out = [path for name, path in named.items() if is_held_out(name)]
    trained = [path for name, path in named.items() if not is_held_out(name)]
    rows = [path for path in trained for _ in range(repeats.get(path.parent.name, 1))]
    write_tables(rows, out / "train", max_bytes=max_mib * MIB)
    write_tables(held_out, out / "holdout", max_bytes=max_mib * MIB)
    return {"train": len(rows), "holdout": len(held_out)}


def write_tables(paths: Iterable[Path], folder: Path, *, max_bytes: int) -> None:
    """Write pictures, one a row, as parquet files of at most `max_bytes` (or of one picture that is larger).

    Equal neighbours are stored once. The column `image` is what `datasets` calls an image: bytes and path.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_folder(folder)
    for index, shard in enumerate(_shards(paths, max_bytes)):
        rows = [{"bytes": path.read_bytes(), "path": f"{path.parent.name}/{path.name}"} for path in shard]
        with atomic_file(folder / f"{index:03d}.parquet") as temporary:
            # Pictures do not compress; a dictionary that may grow to the file's size holds each of them once.
            pq.write_table(
                pa.table({"image": rows}), temporary, compression="none", dictionary_pagesize_limit=2 * max_bytes
            )


def _shards(paths: Iterable[Path], max_bytes: int) -> Iterator[list[Path]]:
    """Neighbours that fit a file together; the repeats of a photo stay in one."""
    shard: list[Path] = []
    num_bytes = 0
    for path, repeated in groupby(paths):
        size = path.stat().st_size
        if shard and num_bytes + size > max_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard += repeated
        num_bytes += size
    if shard:
        yield shard


def main() -> None:
    """Pack, and say what was packed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of folders of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--max-mib", type=int, default=48, help="size of a file at most")
    args = parser.parse_args()
    counts = pack(args.photos, args.out, max_mib=args.max_mib)
    print(f"{counts['train']} rows to train on, {counts['holdout']} photos held out, in {args.out}")


if __name__ == "__main__":
    main()
