"""Exports read by the libraries of those who consume them."""

import gc
import json
import os
import subprocess
import warnings
from pathlib import Path

import export_stores as stores
import numpy as np
import pytest
import torch

from sd_vae.latents.export import export_store

MDS_PYTHON = "SD_VAE_STREAMING_PYTHON"
READ_MDS = """
import json, sys
from streaming.base.format import reader_from_json
index = json.load(open(sys.argv[1] + "/index.json"))
rows = []
for shard in index["shards"]:
    reader = reader_from_json(sys.argv[1], None, shard)
    reader.validate(False)
    for position in range(reader.samples):
        rows.append({k: v.hex() if isinstance(v, bytes) else str(v) for k, v in reader.get_item(position).items()})
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.make(tmp_path_factory.mktemp("stores") / "store")


@pytest.mark.parametrize("values", ["raw", "scaled"])
def test_webdataset_reads_the_tars(store: Path, tmp_path: Path, values: str) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset: pip install webdataset")
    export_store(store, tmp_path / "out", "webdataset", values=values)

    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing to the garbage collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
        gc.collect()

    assert len(samples) == stores.NUM_ITEMS
    for sample, item in zip(samples, stores.items(), strict=True):
        z = stores.draw_of(item)
        expected = z if values == "raw" else stores.scaled(z)
        assert sample["npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["npy"], expected.half())
        assert sample["json"]["scale"]["values"] == values
        assert (sample["json"]["id"], sample["json"]["columns"]) == (item.id, item.columns)


def test_datasets_reads_the_parquet(store: Path, tmp_path: Path) -> None:
    import datasets

    export_store(store, tmp_path / "out", "parquet", values="scaled")

    paths = [str(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    found = datasets.Dataset.from_parquet(paths, cache_dir=str(tmp_path / "cache"))

    assert found.features["latent"] == datasets.Array3D((4, 2, 2), "float32")
    assert len(found) == stores.NUM_ITEMS
    for row, item in zip(found.with_format("numpy"), stores.items(), strict=True):
        np.testing.assert_array_equal(row["latent"], stores.scaled(stores.draw_of(item)))
        assert (row["id"], row["caption"], row["label"]) == (item.id, item.columns["caption"], item.columns["label"])


def test_mds_is_what_its_specification_says(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "mds")

    index = json.loads((tmp_path / "out" / "index.json").read_text())
    samples = []
    for shard in index["shards"]:
        content = (tmp_path / "out" / shard["raw_data"]["basename"]).read_bytes()
        assert len(content) == shard["raw_data"]["bytes"]
        offsets = np.frombuffer(content, np.uint32, shard["samples"] + 1, 4)
        assert offsets[-1] == len(content)
        config = content[4 + 4 * len(offsets) : offsets[0]]
        assert json.loads(config)["column_names"] == shard["column_names"] == sorted(shard["column_names"])
        for start in offsets[:-1].tolist():
            caption, key, latents = np.frombuffer(content, np.uint32, 3, start).tolist()
            body = content[start + 12 :]
            numbers = 4  # of the int32 column that stands between caption and key: height
            samples.append(body[numbers + caption + key : numbers + caption + key + latents])
    for sample, item in zip(samples, stores.items(), strict=True):
        expected = stores.scaled(stores.draw_of(item)).half()
        np.testing.assert_array_equal(np.frombuffer(sample, np.float16).reshape(4, 2, 2), expected)


def test_streaming_reads_the_mds(store: Path, tmp_path: Path) -> None:
    python = os.environ.get(MDS_PYTHON)
    if not python:
        pytest.skip(
            f"needs mosaicml-streaming, whose pins (transformers<5, numpy<2.2) keep it out of this environment: name "
            f"the interpreter of another one in {MDS_PYTHON}"
        )
    export_store(store, tmp_path / "out", "mds")

    done = subprocess.run([python, "-c", READ_MDS, tmp_path / "out"], capture_output=True, text=True, check=True)

    rows = json.loads(done.stdout)
    assert len(rows) == stores.NUM_ITEMS
    for row, item in zip(rows, stores.items(), strict=True):
        latents = np.frombuffer(bytes.fromhex(row["latents_16"]), np.float16).reshape(4, 2, 2)
        np.testing.assert_array_equal(latents, stores.scaled(stores.draw_of(item)).half())
        assert (row["key"], row["caption"]) == (item.id, item.columns["caption"])
        assert (row["original_height"], row["original_width"]) == tuple(map(str, item.original_size))


def test_mds_has_a_column_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stores.moments_of
    monkeypatch.setattr(
        stores,
        "moments_of",
        lambda item: plain(item) if item.position else torch.zeros(8, 4, 4),
    )
    export_store(stores.make(tmp_path / "store"), tmp_path / "out", "mds", draw="mode")

    shard = json.loads((tmp_path / "out" / "index.json").read_text())["shards"][0]

    assert {"latents_16", "latents_32"} < set(shard["column_names"])
