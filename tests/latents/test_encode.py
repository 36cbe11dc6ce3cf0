"""Pictures to stores: the same bytes however the work is done, and what is said when it cannot be."""

import dataclasses
import gc
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_store import contents

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import Picture, PictureTransform, open_records
from sd_vae.errors import UserError
from sd_vae.latents import Item, LatentDataset, LatentStore, verify
from sd_vae.latents.encode import EncodeConfig, Encoded, encode, reencoder

CONFIG = EncodeConfig(
    transform=PictureTransform(size=16, flip=True, factor=2), dtype="float32", shard_items=4, num_workers=0
)


def picture(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures in two folders, the sixth of which is empty."""
    for number in range(10):
        path = tmp_path / "photos" / "ab"[number // 5] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (tmp_path / "photos" / "b" / "5.png").write_bytes(b"")
    return tmp_path / "photos"


def made(vae: AutoencoderKL, photos: Path, folder: Path, config: EncodeConfig = CONFIG, **changes) -> Encoded:
    done = encode(vae, open_records(str(photos)), folder, dataclasses.replace(config, **changes))
    assert done is not None
    return done


def test_encode_stores_what_the_vae_encodes(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    made(tiny_vae, photos, tmp_path / "store")

    dataset = LatentDataset(tmp_path / "store", content="moments")
    assert len(dataset) == 9
    pixels = np.asarray(picture(0).resize((19, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16)))
    with torch.no_grad():
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        exact = tiny_vae.encode(x).latent_dist.parameters[0]
    assert torch.equal(dataset[0]["moments"], exact)
    assert dataset[0]["label"] == "a"


def test_encode_counts_and_lists_rejects(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    done = made(tiny_vae, photos, tmp_path / "store")

    assert (done.manifest.num_records, done.manifest.num_items, done.manifest.num_flipped) == (10, 18, 9)
    assert (done.num_done, done.reasons) == (10, {"empty": 1})
    assert '"reason": "empty"' in (tmp_path / "store" / "rejects.jsonl").read_text()


@pytest.mark.parametrize(
    "changes", [{"num_workers": 2}, {"num_parallel": 3}, {"num_workers": 1, "num_parallel": 2}], ids=str
)
def test_encode_writes_the_same_bytes_however_many_work(changes, photos, tmp_path, tiny_vae) -> None:
    made(tiny_vae, photos, tmp_path / "one", num_parallel=1)

    made(tiny_vae, photos, tmp_path / "many", **changes)

    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_encode_goes_on_after_a_stop(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    made(tiny_vae, photos, tmp_path / "whole")
    records, store = open_records(str(photos)), tmp_path / "stopped"

    def stop(step) -> None:
        if step.num_done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(tiny_vae, records, store, CONFIG, progress=stop)
    assert sorted(path.name for path in store.glob("shard-*.json")) == ["shard-00000.json"]
    done = encode(tiny_vae, records, store, CONFIG)

    assert done.num_done == 6
    assert contents(store) == contents(tmp_path / "whole")


def test_encode_does_nothing_to_a_finished_store(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    made(tiny_vae, photos, tmp_path / "store")
    before = contents(tmp_path / "store")

    done = made(tiny_vae, photos, tmp_path / "store")

    assert done.num_done == 0
    assert contents(tmp_path / "store") == before


class Stream:
    """A data set whose length shows at its end."""

    num_records = None

    def __init__(self, photos: Path, length: int) -> None:
        self.spec = str(photos)
        self.length = length

    def read(self, start: int = 0, stop: int | None = None):
        return itertools.islice(open_records(self.spec).read(start), max(self.length - start, 0))


@pytest.mark.parametrize("length", [8, 10], ids=["whole-shards", "part-of-a-shard"])
def test_encode_reads_a_stream_to_its_end_and_again(length, photos, tmp_path, tiny_vae) -> None:
    stream = Stream(photos, length)

    first = encode(tiny_vae, stream, tmp_path / "store", CONFIG)
    again = encode(tiny_vae, stream, tmp_path / "store", CONFIG)

    assert (first.num_done, first.manifest.num_records) == (length, length)
    assert (again.num_done, again.manifest) == (0, first.manifest)


def test_encode_makes_a_lost_shard_of_a_stream_anew(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    stream = Stream(photos, 10)
    encode(tiny_vae, stream, tmp_path / "store", CONFIG)
    before = contents(tmp_path / "store")
    (tmp_path / "store" / "shard-00001.json").unlink()

    done = encode(tiny_vae, stream, tmp_path / "store", CONFIG)

    assert done.num_done == 4
    assert contents(tmp_path / "store") == before


def test_encode_refuses_an_empty_stream(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(UserError, match=r"holds no records, so there is nothing to encode; give another data set\.$"):
        encode(tiny_vae, Stream(photos, 0), tmp_path / "store", CONFIG)


def test_encode_refuses_data_that_yields_nothing(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"no picture")

    with pytest.raises(UserError, match=r"none of the 10 records of .* \(not-a-picture 10\); .*rejects.jsonl says why"):
        made(tiny_vae, photos, tmp_path / "store")

    assert len((tmp_path / "store" / "rejects.jsonl").read_text().splitlines()) == 10


def test_encode_stops_at_a_reject_where_strict(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(UserError, match=r"5.png is empty: 0 bytes; mend or remove it, or leave --strict out"):
        made(tiny_vae, photos, tmp_path / "store", strict=True)

    assert (tmp_path / "store" / "shard-00000.json").exists()


def test_encode_names_a_vanished_file_and_keeps_the_rest(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    records, gone = open_records(str(photos)), photos / "b" / "7.png"
    content = gone.read_bytes()
    gone.unlink()

    with pytest.raises(UserError, match=r"cannot read .*7.png"):
        encode(tiny_vae, records, tmp_path / "store", CONFIG)
    gone.write_bytes(content)
    done = encode(tiny_vae, records, tmp_path / "store", CONFIG)

    assert done.manifest.num_items == 18
    assert 6 <= done.num_done <= 10  # what came before is kept, but for the shard of 4 that was being encoded


def test_encode_repeats_in_float32_what_half_precision_does_not_hold(photos, tmp_path, tiny_vae) -> None:
    for weight in tiny_vae.encoder.mid_block.resnets[0].conv1.parameters():
        weight.data.mul_(2.0**18)
    half = tiny_vae.half()

    done = made(half, photos, tmp_path / "store")

    assert done.reasons == {"empty": 1}
    assert done.manifest.description.compute_dtype == "float16"
    exact = LatentDataset(tmp_path / "store", content="mode")[0]["z"]
    made(half.float(), photos, tmp_path / "exact")
    # equal, because the weights are the rounded ones in both
    assert torch.equal(exact, LatentDataset(tmp_path / "exact", content="mode")[0]["z"])


def test_encode_rejects_what_is_not_finite_in_float32(photos, tmp_path, tiny_vae, monkeypatch) -> None:
    plain = AutoencoderKL._encode
    black = torch.full((1, 3, 16, 16), -1.0)
    Image.new("RGB", (16, 16)).save(photos / "a" / "3.png")
    monkeypatch.setattr(AutoencoderKL, "_encode", lambda vae, x: plain(vae, x) / (0 if torch.equal(x, black) else 1))

    done = made(tiny_vae, photos, tmp_path / "store")

    assert done.reasons == {"not-finite": 1, "empty": 1}
    assert "2 of 2 latents hold NaN or infinity" in (tmp_path / "store" / "rejects.jsonl").read_text()


def test_encode_holds_few_pictures_at_once(photos, tmp_path, tiny_vae) -> None:
    held: list[int] = []
    others = [one for one in gc.get_objects() if type(one) in (Picture, Item)]  # of tests before this one
    records = Stream(photos, 120)
    ten = list(open_records(str(photos)).read())
    records.read = lambda start=0, stop=None: (dataclasses.replace(ten[n % 10], position=n) for n in range(start, 120))

    def look(step) -> None:
        if step.num_done % 20 == 0:
            held.append(sum(type(one) in (Picture, Item) for one in gc.get_objects()) - len(others))

    encode(tiny_vae, records, tmp_path / "store", CONFIG, progress=look)

    assert len(held) == 7
    # A chunk of 8 pictures, 4 that are being encoded or wait to be, and a shard's 8 items: 20 at most, 18 seen.
    assert max(held) <= 24


def test_encode_names_a_device_that_is_out_of_memory(photos, tmp_path, tiny_vae, monkeypatch) -> None:
    def full(vae, x):
        raise torch.OutOfMemoryError("tried to allocate 7 GiB.\nmore")

    monkeypatch.setattr(AutoencoderKL, "_encode", full)

    with pytest.raises(UserError, match=r"cpu is out of memory at 1 views of 16x16 pixels \(tried to allocate 7 GiB\)"):
        made(tiny_vae, photos, tmp_path / "store")


def test_encode_refuses_another_factor(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(UserError, match=r"the transform has factor 8, the VAE 2; give the transform the VAE's\."):
        made(tiny_vae, photos, tmp_path / "store", transform=PictureTransform(size=16))


def test_encode_refuses_a_vae_for_other_than_rgb(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    tiny_vae.register_to_config(in_channels=1)

    with pytest.raises(UserError, match=r"the VAE takes 1 channels, pictures have 3; use one for RGB\."):
        made(tiny_vae, photos, tmp_path / "store")


def test_encode_config_lists_every_wrong_value() -> None:
    expected = r"threads_per_picture is 0, it must be at least 1; num_workers is -1, it must be at least 0\."
    with pytest.raises(UserError, match=expected):
        EncodeConfig(transform=CONFIG.transform, threads_per_picture=0, num_workers=-1)


def test_encode_refuses_to_go_on_with_another_vae(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    made(tiny_vae, photos, tmp_path / "store")
    tiny_vae.encoder.conv_in.bias.data.add_(1)

    with pytest.raises(UserError, match=r"holds latents of another make: encoder is "):
        made(tiny_vae, photos, tmp_path / "store")


def test_verify_with_the_reencoder_finds_an_intact_store(photos, tmp_path, tiny_vae) -> None:
    made(tiny_vae, photos, tmp_path / "store", dtype="float16")
    reencode = reencoder(tiny_vae, None, LatentStore.open(tmp_path / "store"))

    found = verify(tmp_path / "store", tiny_vae, reencode, num_samples=18)

    assert (found.ok, found.num_reencoded, found.largest_difference) == (True, 18, 0.0)


def test_verify_with_the_reencoder_finds_changed_pictures(photos, tmp_path, tiny_vae) -> None:
    made(tiny_vae, photos, tmp_path / "store")
    picture(99).save(photos / "a" / "2.png")
    (photos / "a" / "3.png").unlink()
    reencode = reencoder(tiny_vae, str(photos), LatentStore.open(tmp_path / "store"))

    found = verify(tmp_path / "store", tiny_vae, reencode, num_samples=18)

    messages = [damage.message for damage in found.damages]
    assert any("a/2.png has changed: record 2" in message and "sha256" in message for message in messages)
    assert any("is a/4.png with sha256" in message for message in messages)
    assert any("is gone: " in message and "has no record 9" in message for message in messages)


def test_reencoder_refuses_another_dtype(photos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    made(tiny_vae, photos, tmp_path / "store")

    with pytest.raises(UserError, match=r"the VAE is bfloat16, .* was encoded in float32; load it in that\."):
        reencoder(tiny_vae.bfloat16(), None, LatentStore.open(tmp_path / "store"))


def test_reencoder_names_a_latent_that_is_no_longer_finite(photos, tmp_path, tiny_vae) -> None:
    made(tiny_vae, photos, tmp_path / "store")
    reencode = reencoder(tiny_vae, None, LatentStore.open(tmp_path / "store"))
    store = LatentStore.open(tmp_path / "store")
    item = store.reader(store.manifest().shards[0]).item(0)
    torch.nn.init.constant_(tiny_vae.quant_conv.bias, float("nan"))

    with pytest.raises(UserError, match=r"a/0.png encodes to NaN or infinity; it had a finite latent before"):
        reencode(item)
