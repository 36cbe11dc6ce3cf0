"""Each layout as its documentation describes it, read by a reader written here from that documentation."""

import json
import zipfile
from pathlib import Path

import export_stores as stores
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchvision.datasets import DatasetFolder

from sd_vae.config import VAEConfig
from sd_vae.latents.export import export_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.make(tmp_path_factory.mktemp("stores") / "store")


def test_kohya_holds_raw_draws_beside_the_pictures(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "kohya", seed=3)

    for item in stores.items():
        height, width = item.original_size
        name = f"{item.id.removesuffix('.png')}_{width:04d}x{height:04d}_sd.npz"
        with np.load(tmp_path / "out" / name, allow_pickle=False) as archive:
            np.testing.assert_array_equal(archive["latents"], stores.draw_of(item, 3))
            np.testing.assert_array_equal(archive["latents_flipped"], stores.draw_of(stores.flipped(item), 3))
            assert archive["original_size"].tolist() == [width, height]


def test_kohya_crop_is_the_picture_fitted_into_its_bucket(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "kohya")

    with np.load(tmp_path / "out" / "0" / "0_0030x0040_sd.npz") as archive:
        # A bucket of 16x16 and a picture 30 wide, 40 high: 12 wide, 16 high in the middle.
        assert archive["crop_ltrb"].tolist() == [2.0, 0.0, 14.0, 16.0]


def test_kohya_crop_of_a_wide_picture_fits_its_width(tmp_path: Path) -> None:
    chosen = stores.items(original_size=(30, 60))
    export_store(stores.make(tmp_path / "store", chosen), tmp_path / "out", "kohya")

    with np.load(tmp_path / "out" / "0" / "0_0060x0030_sd.npz") as archive:
        assert archive["crop_ltrb"].tolist() == [0.0, 4.0, 16.0, 12.0]


def test_kohya_names_sdxl_latents_so(tmp_path: Path) -> None:
    folder = stores.make(tmp_path / "store", vae=VAEConfig.from_preset("sdxl"))
    export_store(folder, tmp_path / "out", "kohya")

    assert (tmp_path / "out" / "0" / "0_0030x0040_sdxl.npz").is_file()


def test_dit_holds_scaled_draws_and_labels(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "dit")

    for index, item in enumerate(stores.items()):
        features = np.load(tmp_path / "out" / "imagenet256_features" / f"{index}.npy", allow_pickle=False)
        labels = np.load(tmp_path / "out" / "imagenet256_labels" / f"{index}.npy", allow_pickle=False)
        assert (features.shape, features.dtype) == ((1, 4, 2, 2), np.float32)
        np.testing.assert_array_equal(features[0], stores.scaled(stores.draw_of(item)))
        assert (labels.tolist(), labels.dtype) == ([item.position % 3], np.int64)


@pytest.mark.parametrize(("layout", "root"), [("repa", "vae-sd"), ("edm2", ".")])
def test_mean_std_folder_holds_raw_moments_and_labels(store: Path, tmp_path: Path, layout: str, root: str) -> None:
    export_store(store, tmp_path / "out", layout)

    folder = tmp_path / "out" / root
    labels = dict(json.loads((folder / "dataset.json").read_text())["labels"])
    for index, item in enumerate(stores.items()):
        name = f"00000/img-mean-std-{index:08d}.npy"
        mean, std = np.split(np.load(folder / name, allow_pickle=False), 2)
        np.testing.assert_array_equal(mean, stores.mean_of(item))
        np.testing.assert_array_equal(std, torch.exp(0.5 * stores.logvar_of(item)))
        assert labels[name] == item.position % 3


def test_edm2_zip_is_the_folder_uncompressed(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "folder", "edm2")
    export_store(store, tmp_path / "zip", "edm2-zip")

    with zipfile.ZipFile(tmp_path / "zip" / "latents.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert len(archive.namelist()) == stores.NUM_ITEMS + 1
        for name in archive.namelist():
            assert archive.read(name) == (tmp_path / "folder" / name).read_bytes()


def test_edm2_without_labels_says_null(tmp_path: Path) -> None:
    folder = stores.make(tmp_path / "store", stores.items(label=False))
    export_store(folder, tmp_path / "out", "edm2", unlabelled=True)

    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == {"labels": None}


def test_mar_holds_raw_moments_of_both_in_class_folders(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "mar")

    found = DatasetFolder(str(tmp_path / "out"), loader=np.load, extensions=(".npz",))
    by_index = {Path(path).stem: (path, label) for path, label in found.samples}
    assert len(found) == stores.NUM_ITEMS
    for index, item in enumerate(stores.items()):
        path, label = by_index[f"{index:08d}"]
        assert label == item.position % 3
        with np.load(path, allow_pickle=False) as archive:
            np.testing.assert_array_equal(archive["moments"], stores.moments_of(item))
            np.testing.assert_array_equal(archive["moments_flip"], stores.moments_of(stores.flipped(item)))


def test_lightningdit_holds_raw_draws_of_both_and_labels(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "lightningdit")

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"latents_rank00_shard00{k}.safetensors" for k in range(3)]
    loaded = [load_file(file) for file in files]
    joined = {name: torch.cat([tensors[name] for tensors in loaded]) for name in loaded[0]}
    items = stores.items()
    assert torch.equal(joined["latents"], torch.stack([stores.draw_of(item) for item in items]))
    assert torch.equal(joined["latents_flip"], torch.stack([stores.draw_of(stores.flipped(item)) for item in items]))
    assert joined["labels"].tolist() == [item.position % 3 for item in items]


def test_lightningdit_statistics_are_those_of_all_latents(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "lightningdit")

    statistics = torch.load(tmp_path / "out" / "latents_stats.pt", weights_only=True)
    latents = torch.stack([stores.draw_of(item) for item in stores.items()])
    # worst seen 6e-8 (float32 sums of torch); leaving out one of nine items moves the mean by 1e-2
    torch.testing.assert_close(statistics["mean"], latents.mean((0, 2, 3), keepdim=True), rtol=0, atol=1e-6)
    torch.testing.assert_close(statistics["std"], latents.std((0, 2, 3), keepdim=True), rtol=0, atol=1e-6)


def test_comfyui_holds_raw_draws_and_the_mark(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "comfyui")

    for index, item in enumerate(stores.items()):
        stem = item.id.split("/")[1].removesuffix(".png")
        tensors = load_file(tmp_path / "out" / f"{stem}_{index:05d}_.latent")
        assert torch.equal(tensors["latent_tensor"], stores.draw_of(item)[None])
        assert tensors["latent_format_version_0"].numel() == 0


def test_mode_is_the_mean(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "dit", draw="mode")

    features = np.load(tmp_path / "out" / "imagenet256_features" / "0.npy")
    np.testing.assert_array_equal(features[0], stores.scaled(stores.mean_of(stores.items()[0])))


def test_a_store_of_samples_exports_what_it_holds(tmp_path: Path) -> None:
    folder = stores.make(tmp_path / "store", content="sample", seed=7)
    note = export_store(folder, tmp_path / "out", "comfyui", seed=1)

    tensors = load_file(tmp_path / "out" / "0_00000_.latent")
    assert torch.equal(tensors["latent_tensor"][0], stores.draw_of(stores.items()[0], 7))
    assert note.seed == 7
