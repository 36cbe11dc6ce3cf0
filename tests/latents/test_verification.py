"""Every kind of damage is found and named, and a sound store has none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import synthetic_store as synthetic
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from synthetic_store import NUM_RECORDS, describe, fill, item, moments_of

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError
from sd_vae.latents import Item, LatentStore, encoder_fingerprint, verify
from sd_vae.latents.records import FileSum


def _found(folder: Path, **options: Any) -> list[tuple[str, str]]:
    return [(damage.kind, damage.file) for damage in verify(folder, **options).damages]


def test_verify_finds_nothing_wrong_with_a_sound_store(store_folder: Path) -> None:
    verification = verify(store_folder, reencode=moments_of, num_samples=100)

    assert verification.ok
    assert (verification.num_shards, verification.num_items, verification.num_reencoded) == (3, 9, 9)
    assert verification.largest_difference == 0.0


@pytest.mark.parametrize("options", [{"content": "mode"}, {"content": "sample", "seed": 1}, {"dtype": "bfloat16"}])
def test_verify_encodes_again_what_the_store_holds(options: dict[str, Any], tmp_path: Path) -> None:
    synthetic.make(tmp_path / "store", flip=True, num_views=2, **options)

    verification = verify(tmp_path / "store", reencode=moments_of, num_samples=100)

    assert verification.ok
    assert verification.num_reencoded == 36
    assert verification.largest_difference == 0.0


def test_verify_reports_each_shard_as_it_goes(store_folder: Path) -> None:
    seen = []

    verify(store_folder, progress=lambda record: seen.append(record.shard))

    assert seen == [0, 1, 2]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "kind"),
    [
        (Path.unlink, "shard-00001.safetensors", "missing"),
        (Path.unlink, "shard-00001.arrow", "missing"),
        (Path.unlink, "rejects.jsonl", "missing"),
        (Path.unlink, "manifest.json", "unfinished"),
        (_cut, "shard-00002.safetensors", "truncated"),
        (_cut, "shard-00002.arrow", "truncated"),
        (_cut, "shard-00002.json", "contents"),
        (_cut, "manifest.json", "manifest"),
        (_cut, "rejects.jsonl", "contents"),
        (_flip_a_bit, "shard-00000.safetensors", "checksum"),
        (_flip_a_bit, "shard-00000.arrow", "checksum"),
    ],
)
def test_verify_names_the_damage(damage: Callable[[Path], object], name: str, kind: str, store_folder: Path) -> None:
    damage(store_folder / name)

    assert (kind, name) in _found(store_folder)


def test_verify_says_both_values_and_the_remedy(store_folder: Path) -> None:
    _cut(store_folder / "shard-00002.arrow")

    (damage,) = verify(store_folder).damages

    assert str(damage).startswith("shard-00002.arrow: truncated: has ")
    assert "instead of" in damage.message
    assert "run sd-vae encode again" in damage.message


def test_verify_finds_a_missing_shard(store_folder: Path) -> None:
    for path in store_folder.glob("shard-00002.*"):
        path.unlink()

    found = _found(store_folder)

    assert ("missing", "shard-00002.json") in found
    assert ("manifest", "manifest.json") in found


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda manifest: manifest.update(num_items=8), "num_items is 8, by store.json and the shards' records 9"),
        (lambda manifest: manifest["description"].update(encoder="f" * 64), "description.encoder is 'fff"),
        (lambda manifest: manifest["description"]["vae"].update(scaling_factor=1.0), "scaling_factor is 1.0"),
        (lambda manifest: manifest["shards"].pop(), "shards.2.shard is 'absent'"),
        (lambda manifest: manifest["shards"][0].update(stop=3), "shards.0.stop is 3"),
        (lambda manifest: manifest["rounding"]["mean"].update(max=0.0), "rounding.mean.max is 0.0"),
    ],
)
def test_verify_finds_an_edited_manifest(edit: Callable[[Any], object], field: str, store_folder: Path) -> None:
    path = store_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))

    damages = verify(store_folder).damages

    assert {(damage.kind, damage.file) for damage in damages} == {("manifest", "manifest.json")}
    assert any(field in damage.message for damage in damages)


def test_verify_finds_an_edited_description(store_folder: Path) -> None:
    path = store_folder / "store.json"
    path.write_text(path.read_text().replace('"size": 16', '"size": 32'))

    found = _found(store_folder)

    assert ("manifest", "manifest.json") in found
    assert [file for kind, file in found if kind == "contents"] == [f"shard-0000{k}.json" for k in range(3)]


def _vouch(folder: Path, shard: int) -> None:
    """Make the records say of a changed shard what is true of it, as a foreign writer would."""
    path = folder / f"shard-{shard:05d}.json"
    record = json.loads(path.read_text())
    for name in record["files"]:
        file_sum = FileSum.of_file(folder / name)
        record["files"][name] = {"num_bytes": file_sum.num_bytes, "sha256": file_sum.sha256}
    path.write_text(json.dumps(record))
    LatentStore.open(folder).finish(NUM_RECORDS)


def _change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "shard-00000.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    change(tensors)
    save_file(tensors, path)
    _vouch(folder, 0)


def _change_rows(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = folder / "shard-00000.arrow"
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        table = change(stream.read_all())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    _vouch(folder, 0)


def _set(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_verify_finds_values_that_are_not_finite(value: float, store_folder: Path) -> None:
    _change_tensors(store_folder, lambda tensors: tensors["logvar/2x2"][1, 0, 0].fill_(value))

    (damage,) = verify(store_folder).damages

    assert (damage.kind, damage.file) == ("not finite", "shard-00000.safetensors")
    assert "the latent of picture 1 holds NaN or infinity" in damage.message


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tensors: tensors.update({"mean/2x2": tensors["mean/2x2"][:2]}), id="count"),
        pytest.param(lambda tensors: tensors.update({"mean/2x2": tensors["mean/2x2"].reshape(3, 2, 4, 2)}), id="shape"),
        pytest.param(lambda tensors: tensors.update({"mean/2x2": tensors["mean/2x2"].float()}), id="dtype"),
        pytest.param(lambda tensors: tensors.pop("mean/2x4"), id="tensor"),
    ],
)
def test_verify_finds_tensors_that_do_not_fit(change: Callable[[Any], object], store_folder: Path) -> None:
    _change_tensors(store_folder, change)

    (damage,) = verify(store_folder).damages

    assert (damage.kind, damage.file) == ("contents", "shard-00000.safetensors")
    assert "its record says" in damage.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(0, 3), "holds 3 rows"),
        (lambda table: table.drop_columns(["sha256"]), "holds 4 rows with columns position"),
        (lambda table: _set(table, "position", [0, 1, 2, 9]), "has records 0 to 9, the shard covers 0 to 4"),
        (lambda table: _set(table, "position", [0, 1, 1, 3]), "has 3 records with items or rejected instead of 4"),
        (lambda table: _set(table, "flipped", [False, True, False, False]), "has 1 mirrored items instead of 0"),
        (lambda table: _set(table, "latent_index", [0, 0, 0, 2]), "has 3 latent places instead of 4"),
    ],
)
def test_verify_finds_rows_that_do_not_fit(
    change: Callable[[pa.Table], pa.Table], message: str, store_folder: Path
) -> None:
    _change_rows(store_folder, change)

    damages = verify(store_folder).damages

    assert {(damage.kind, damage.file) for damage in damages} == {("contents", "shard-00000.arrow")}
    assert any(message in damage.message for damage in damages)


def test_verify_finds_a_latent_that_is_not_its_pictures(store_folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mean/2x2"] = tensors["mean/2x2"][[1, 0, 2]]

    _change_tensors(store_folder, swap)

    damages = verify(store_folder, reencode=moments_of, num_samples=100).damages

    assert [(damage.kind, damage.file) for damage in damages] == [("latent", "shard-00000.safetensors")] * 2
    assert "the latent of picture 0 differs by" in damages[0].message


def test_verify_allows_another_machines_last_bits(store_folder: Path) -> None:
    def nearly(one: Item) -> torch.Tensor:
        moments = moments_of(one)
        return moments + 5e-5 * moments.abs().max()

    verification = verify(store_folder, reencode=nearly, num_samples=100)

    assert verification.ok
    assert 0 < (verification.largest_difference or 0) < 1.1e-3
    assert not verify(store_folder, reencode=nearly, num_samples=100, tolerance=1e-6).ok


def test_verify_finds_a_latent_of_another_size(store_folder: Path) -> None:
    (damage,) = verify(store_folder, reencode=lambda one: torch.zeros(8, 3, 3), num_samples=1).damages

    assert damage.kind == "latent"
    assert "encoded again (4, 3, 3)" in damage.message


def test_verify_names_a_picture_that_is_gone(store_folder: Path) -> None:
    def reencode(one: Item) -> torch.Tensor:
        raise UserError(f"{one.source} has changed; restore it.")

    verification = verify(store_folder, reencode=reencode, num_samples=1)

    assert [damage.kind for damage in verification.damages] == ["source"]
    assert "has changed" in verification.damages[0].message
    assert verification.num_reencoded == 0
    assert verification.largest_difference is None


def test_verify_compares_the_encoder(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    synthetic.make(tmp_path / "store", encoder=encoder_fingerprint(tiny_vae))
    assert verify(tmp_path / "store", tiny_vae).ok

    with torch.no_grad():
        tiny_vae.quant_conv.bias += 1

    (damage,) = verify(tmp_path / "store", tiny_vae).damages
    assert (damage.kind, damage.file) == ("encoder", "store.json")
    assert "the VAE given has" in damage.message


def test_verify_of_an_unfinished_store_checks_what_is_there(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", describe())
    fill(store, [1])
    _flip_a_bit(store.folder / "shard-00001.arrow")

    assert _found(store.folder) == [("unfinished", "manifest.json"), ("checksum", "shard-00001.arrow")]


def test_verify_refuses_a_folder_without_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a latent store"):
        verify(tmp_path)


def test_verify_chooses_by_seed(store_folder: Path) -> None:
    def chosen(seed: int) -> list[str]:
        seen = []

        def reencode(one: Item) -> torch.Tensor:
            seen.append(one.id)
            return moments_of(one)

        verify(store_folder, reencode=reencode, num_samples=3, seed=seed)
        return seen

    assert len(chosen(0)) == 3
    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


def test_item_is_described_in_a_few_words() -> None:
    assert str(item(3, 2, flipped=True)) == "picture 3 view 2 mirrored"
