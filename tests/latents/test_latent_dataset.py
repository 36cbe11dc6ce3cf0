"""A store as training reads it: values, draws, mirror images, columns, workers, the `datasets` view."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic_store as synthetic
import torch
from synthetic_store import describe, item, moments_of, reject
from torch.utils.data import DataLoader

from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.latents import LatentDataset, LatentStore

POSITIONS = [0, 1, 2, 3, 4, 6, 7, 8, 9]  # 5 is rejected


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def flip_folder(tmp_path: Path) -> Path:
    """Two views of each picture, each with its mirror image."""
    synthetic.make(tmp_path / "flips", flip=True, num_views=2)
    return tmp_path / "flips"


def test_dataset_has_the_items_in_the_order_of_the_source(store_folder: Path) -> None:
    dataset = LatentDataset(store_folder)

    items = [dataset.item(index) for index in range(len(dataset))]

    assert items == [item(position) for position in POSITIONS]


def test_moments_are_those_that_were_written(store_folder: Path) -> None:
    dataset = LatentDataset(store_folder, content="moments")

    for index, position in enumerate(POSITIONS):
        expected = moments_of(item(position)).half().float()
        assert torch.equal(dataset.sample(index), expected)
        assert torch.equal(dataset[index]["moments"], expected)


def test_mode_is_the_mean(store_folder: Path) -> None:
    z = LatentDataset(store_folder, content="mode").sample(2)

    assert torch.equal(z, moments_of(item(2))[:4].half().float())


def test_sample_is_mean_plus_std_times_noise(store_folder: Path) -> None:
    z = LatentDataset(store_folder).sample(3, _generator())

    mean, logvar = moments_of(item(3)).half().float().chunk(2)
    noise = torch.empty_like(mean).normal_(generator=_generator())
    # worst seen 1.2e-7: a fused multiply-add
    torch.testing.assert_close(z, mean + (0.5 * logvar).exp() * noise, rtol=0, atol=1e-6)


def test_sample_follows_the_generator(store_folder: Path) -> None:
    dataset, generator = LatentDataset(store_folder), _generator()

    first, second = dataset.sample(0, generator), dataset.sample(0, generator)

    assert torch.equal(first, dataset.sample(0, _generator()))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("vae", "expected"),
    [
        (VAEConfig(scaling_factor=0.5, shift_factor=0.25), lambda z: (z - 0.25) * 0.5),
        (VAEConfig(scaling_factor=0.5), lambda z: z * 0.5),
        (
            VAEConfig(scaling_factor=0.5, latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(1.0, 2.0, 4.0, 8.0)),
            lambda z: (
                (z - torch.tensor([1.0, 2, 3, 4])[:, None, None]) * 0.5 / torch.tensor([1.0, 2, 4, 8])[:, None, None]
            ),
        ),
    ],
)
def test_scaled_latents_are_those_of_the_config(
    vae: VAEConfig, expected: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    synthetic.make(tmp_path / "store", vae=vae)

    z = LatentDataset(tmp_path / "store").sample(0, _generator())
    latents = LatentDataset(tmp_path / "store", scaled=True).sample(0, _generator())

    # worst seen 0: all factors are powers of two
    torch.testing.assert_close(latents, expected(z), rtol=0, atol=1e-6)


def test_item_is_named_after_what_it_holds(store_folder: Path) -> None:
    raw, scaled, moments = (
        LatentDataset(store_folder, **options) for options in ({}, {"scaled": True}, {"content": "moments"})
    )

    assert list(raw[0]) == ["z", "caption", "label"]
    assert list(scaled[0]) == ["latents", "caption", "label"]
    assert list(moments[0]) == ["moments", "caption", "label"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sample_leaves_the_store_as_it_is(dtype: str, tmp_path: Path) -> None:
    synthetic.make(tmp_path / "store", dtype=dtype)
    dataset = LatentDataset(tmp_path / "store", content="mode")
    before = dataset.sample(0).clone()
    assert before.dtype == torch.float32

    dataset.sample(0).fill_(7.0)

    assert torch.equal(dataset.sample(0), before)


def test_fixed_sample_is_what_was_stored(tmp_path: Path) -> None:
    synthetic.make(tmp_path / "store", content="sample", seed=3)
    dataset = LatentDataset(tmp_path / "store")

    assert torch.equal(dataset.sample(0, _generator(0)), dataset.sample(0, _generator(1)))


def test_item_is_a_function_of_seed_epoch_and_index(store_folder: Path) -> None:
    def read(seed: int, epoch: int, index: int) -> torch.Tensor:
        dataset = LatentDataset(store_folder, seed=seed)
        dataset.set_epoch(epoch)
        return dataset[index]["z"]

    assert torch.equal(read(1, 2, 3), read(1, 2, 3))
    noise = [read(*key) - moments_of(item(3))[:4] for key in ((1, 2, 3), (1, 3, 3), (2, 2, 3))]
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_item_counts_from_the_end(store_folder: Path) -> None:
    dataset = LatentDataset(store_folder)

    assert torch.equal(dataset[-1]["z"], dataset[8]["z"])


@pytest.mark.parametrize("index", [9, -10])
def test_item_beyond_the_end_is_an_index_error(index: int, store_folder: Path) -> None:
    with pytest.raises(IndexError, match=rf"item {index} of 9"):
        LatentDataset(store_folder)[index]


def test_dataset_can_be_iterated(store_folder: Path) -> None:
    assert [one["caption"] for one in LatentDataset(store_folder)] == [f"number {position}" for position in POSITIONS]


def test_flips_are_no_items_of_their_own(flip_folder: Path) -> None:
    dataset = LatentDataset(flip_folder)

    assert len(dataset) == 2 * len(POSITIONS)
    assert not any(dataset.item(index).flipped for index in range(len(dataset)))


def test_flips_off_gives_the_picture_as_it_is(flip_folder: Path) -> None:
    dataset = LatentDataset(flip_folder, content="mode")

    assert all(torch.equal(dataset.sample(3), moments_of(item(1, 1))[:4].half().float()) for _ in range(20))


def test_flips_draw_the_mirror_image_half_of_the_time(flip_folder: Path) -> None:
    dataset, generator = LatentDataset(flip_folder, content="mode", flips=True), _generator()
    plain, mirrored = (moments_of(item(1, 1, flipped))[:4].half().float() for flipped in (False, True))

    drawn = [dataset.sample(3, generator) for _ in range(400)]

    num_mirrored = sum(torch.equal(z, mirrored) for z in drawn)
    assert num_mirrored + sum(torch.equal(z, plain) for z in drawn) == 400
    assert 160 <= num_mirrored <= 240  # 4 standard errors


def test_item_of_a_mirror_image_says_so(flip_folder: Path) -> None:
    assert LatentDataset(flip_folder).item(3, flipped=True) == item(1, 1, flipped=True)


def test_column_is_read_without_the_latents(flip_folder: Path) -> None:
    column = LatentDataset(flip_folder).column("label")

    assert column == [position % 3 for position in POSITIONS for _ in range(2)]


def test_columns_can_be_chosen(store_folder: Path) -> None:
    assert list(LatentDataset(store_folder, columns=["label"])[0]) == ["z", "label"]


def test_column_that_a_shard_lacks_is_none(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", describe(num_records=5))
    with store.writer(0) as writer:
        for position in range(4):
            writer.add(item(position, columns={}), moments_of(item(position)))
    with store.writer(1) as writer:
        writer.add(item(4, columns={"caption": "last"}), moments_of(item(4)))
    store.finish(5)

    dataset = LatentDataset(tmp_path / "store")

    assert dataset.column("caption") == [None] * 4 + ["last"]
    assert dataset.as_hf_dataset()["caption"] == [None] * 4 + ["last"]


def test_sizes_tell_which_items_go_together(store_folder: Path) -> None:
    sizes = LatentDataset(store_folder).sizes

    assert sizes.tolist() == [[2, 4] if position % 3 == 2 else [2, 2] for position in POSITIONS]
    assert all(tuple(z.shape[1:]) == tuple(size) for z, size in zip(_all(store_folder), sizes, strict=True))


def _all(folder: Path) -> list[torch.Tensor]:
    return [one["z"] for one in LatentDataset(folder)]


def test_index_of_finds_a_view(flip_folder: Path) -> None:
    dataset = LatentDataset(flip_folder)

    assert dataset.item(dataset.index_of(6, 1)) == item(6, 1)
    with pytest.raises(KeyError):
        dataset.index_of(5)


def test_dataset_of_an_empty_store_is_empty(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", describe(num_records=1))
    with store.writer(0) as writer:
        writer.reject(reject(0))
    store.finish(1)

    dataset = LatentDataset(tmp_path / "store")

    assert len(dataset) == 0
    assert dataset.sizes.shape == (0, 2)
    with pytest.raises(UserError, match=r"holds no items; see rejects\.jsonl for why"):
        dataset.as_hf_dataset()


def test_dataset_pickles_without_open_files(store_folder: Path) -> None:
    dataset = LatentDataset(store_folder, scaled=True, seed=5)
    first = dataset[0]["latents"]

    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own bytes

    assert torch.equal(again[0]["latents"], first)
    assert len(pickle.dumps(dataset)) < 20_000


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_one_process_reads(context: str, store_folder: Path) -> None:
    dataset = LatentDataset(store_folder, columns=["label"])
    dataset[0]  # a worker that is forked inherits the open files
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context=context, generator=torch.Generator()
    )

    read = [one["z"] for one in loader]

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(read, _all(store_folder), strict=True))


def test_persistent_workers_see_the_next_epoch(store_folder: Path) -> None:
    dataset = LatentDataset(store_folder)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
        generator=torch.Generator(),
    )

    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append([one["z"] for one in loader])

    assert torch.equal(epochs[1][0], dataset[0]["z"])
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_hf_view_has_the_items_and_their_columns(flip_folder: Path) -> None:
    dataset = LatentDataset(flip_folder, scaled=True, flips=True)

    view = dataset.as_hf_dataset()

    assert len(view) == len(dataset)
    assert {"caption", "label"} <= set(view.column_names)
    for index in (0, 7, 17):
        assert torch.equal(view[index]["latents"], dataset[index]["latents"])
        assert view[index]["caption"] == dataset[index]["caption"]


def test_hf_view_stays_right_after_filter_and_shuffle(store_folder: Path, tmp_path: Path) -> None:
    dataset = LatentDataset(store_folder)

    view = dataset.as_hf_dataset().select([4, 7, 1]).shuffle(seed=0)

    by_caption = {one["caption"]: one["z"] for one in dataset}
    assert {row["caption"] for row in view} == {"number 4", "number 8", "number 1"}
    assert all(torch.equal(row["z"], by_caption[row["caption"]]) for row in view)


def test_hf_view_refuses_columns_of_two_types(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", describe(num_records=5))
    with store.writer(0) as writer:
        for position in range(4):
            writer.add(item(position, columns={"label": 1}), moments_of(item(position)))
    with store.writer(1) as writer:
        writer.add(item(4, columns={"label": "one"}), moments_of(item(4)))
    store.finish(5)

    with pytest.raises(UserError, match=r"the shards of .* do not go together: .*label.*; leave out columns"):
        LatentDataset(tmp_path / "store").as_hf_dataset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"content": "latents"}, "content is 'latents', choose one of: moments, mode, sample"),
        ({"content": "moments", "scaled": True}, "content is moments with scaled, and moments are raw"),
        ({"flips": True}, "flips are asked for and .* holds no mirror images; encode with --flip"),
        ({"columns": ["colour"]}, "has no column 'colour'; its columns: caption, label"),
    ],
)
def test_dataset_refuses(options: dict[str, Any], message: str, store_folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        LatentDataset(store_folder, **options)


@pytest.mark.parametrize(("held", "asked"), [("mode", "sample"), ("mode", "moments"), ("sample", "mode")])
def test_dataset_refuses_what_the_store_does_not_hold(held: Any, asked: Any, tmp_path: Path) -> None:
    synthetic.make(tmp_path / "store", content=held, seed=0 if held == "sample" else None)

    with pytest.raises(UserError, match=f"holds content {held}, {asked} is asked for; ask for {held}, or encode mom"):
        LatentDataset(tmp_path / "store", content=asked)


def test_dataset_refuses_a_column_called_like_the_values(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", describe(num_records=1))
    with store.writer(0) as writer:
        writer.add(item(0, columns={"z": 1}), moments_of(item(0)))
    store.finish(1)

    with pytest.raises(UserError, match="has a column named 'z' like the values; name the columns you want"):
        LatentDataset(tmp_path / "store")


def test_dataset_refuses_mirror_images_that_are_not_there(store_folder: Path) -> None:
    with pytest.raises(UserError, match="holds no mirror images; encode with --flip"):
        LatentDataset(store_folder).item(0, flipped=True)


@pytest.mark.parametrize("suffix", ["safetensors", "arrow"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing; run sd-vae encode again with the same arguments"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "has [0-9]+ bytes instead of [0-9]+; run sd-vae"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), r"is damaged \(.*\); remove it, run sd-vae"),
    ],
)
def test_dataset_names_a_damaged_file(
    damage: Callable[[Path], object], message: str, suffix: str, store_folder: Path
) -> None:
    dataset = LatentDataset(store_folder)
    damage(store_folder / f"shard-00001.{suffix}")

    assert math.isfinite(float(dataset[0]["z"].sum()))
    with pytest.raises(UserError, match=rf"shard-00001\.{suffix} {message}"):
        dataset[4]


def test_dataset_maps_files_instead_of_reading_them(store_folder: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see what is mapped")

    dataset = LatentDataset(store_folder)
    dataset[0]

    mapped = maps.read_text()
    assert str(store_folder / "shard-00000.safetensors") in mapped
    assert str(store_folder / "shard-00000.arrow") in mapped
    assert str(store_folder / "shard-00001.safetensors") not in mapped
