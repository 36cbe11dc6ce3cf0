"""`sd-vae latents`: what it prints, what it refuses, what it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd_vae.cli import main
from sd_vae.latents import LatentDataset


@pytest.fixture
def store(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The workplace, with its photos encoded by start in store."""
    assert main(["encode", "start", "photos", "--out", "store", "--size", "16", "--workers", "0"]) == 0
    capsys.readouterr()
    return place / "store"


def _json(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(f"{arguments} --json".split()) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _set_config(**fields: Any) -> None:
    path = Path("start/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _config() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path("start/config.json").read_text())
    return values


@pytest.mark.parametrize("action", ["verify", "stats", "preview", "export"])
def test_latents_explains_its_actions(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latents"]) == 0
    assert f"  {action}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["latents", action, "--help"])
    assert f"sd-vae latents {action}" in capsys.readouterr().out


@pytest.mark.usefixtures("store")
def test_verify_finds_a_store_intact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latents", "verify", "store", "--vae", "start", "--data", "photos"]) == 0

    output = capsys.readouterr()
    assert "1 shards with 4 latents read" in output.out
    assert "4 pictures encoded again, largest difference" in output.out
    assert "store is intact" in output.err


def test_verify_names_every_damage(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "rejects.jsonl").unlink()
    (store / "shard-00000.arrow").write_bytes(b"")

    assert main(["latents", "verify", "store"]) == 2

    output = capsys.readouterr()
    assert "shard-00000.arrow: truncated: has 0 bytes" in output.out
    assert "rejects.jsonl: missing" in output.out
    assert "error: store is damaged: 2 damages, listed on standard output" in output.err


def test_verify_prints_damages_as_json(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "manifest.json").unlink()

    assert main(["latents", "verify", "store", "--json"]) == 2

    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [(damage["kind"], damage["file"]) for damage in found["damages"]] == [("unfinished", "manifest.json")]


@pytest.mark.usefixtures("store")
def test_verify_finds_a_picture_that_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (48, 40)).save("photos/2.png")

    assert main(["latents", "verify", "store", "--vae", "start", "--data", "photos"]) == 2
    assert "source: " in capsys.readouterr().out


@pytest.mark.usefixtures("store")
def test_stats_prints_figures_with_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latents", "stats", "store"]) == 0

    output = capsys.readouterr()
    assert "with 95% intervals over 4 pictures" in output.out
    assert "covariance of z" in output.out
    assert "±" in output.out
    assert "note: scaling_factor 0.18215 is what diffusion models of the family sd1 were trained with" in output.err


@pytest.mark.usefixtures("store")
def test_stats_gives_each_figure_its_interval_and_number_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json("latents stats store", capsys)

    for figure in (found["scaling_factor"], found["kl"], found["channels"][2]["std"], found["covariance"][0][3]):
        assert figure["low"] < figure["value"] < figure["high"]
        assert figure["n"] == 4
    assert len(found["latents_mean"]) == 4
    assert "must keep it" in found["keep"]


@pytest.mark.usefixtures("store")
def test_stats_keeps_the_scale_of_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    before = _config()

    assert main(["latents", "stats", "store", "--write", "start"]) == 2

    assert "a VAE whose decoder alone was fine-tuned must keep it" in capsys.readouterr().err
    assert _config() == before


@pytest.mark.usefixtures("store")
def test_stats_writes_the_scale_of_a_new_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    before = _config()

    found = _json("latents stats store --write start --new-encoder", capsys)

    assert _config() == before | {"scaling_factor": found["scaling_factor"]["value"]}
    assert found["written"]["scaling_factor"] == [0.18215, found["scaling_factor"]["value"]]


@pytest.mark.usefixtures("store")
def test_stats_writes_the_shift(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json("latents stats store --write start --new-encoder --convention shift", capsys)

    assert _config()["shift_factor"] == found["shift_factor"]["value"]


@pytest.mark.usefixtures("store")
def test_stats_writes_a_scale_that_gives_unit_variance(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latents", "stats", "store", "--write", "start", "--new-encoder", "--convention", "channels"]) == 0
    assert main(["encode", "start", "photos", "--out", "again", "--size", "16", "--workers", "0"]) == 0
    capsys.readouterr()

    dataset = LatentDataset(place / "again", scaled=True)
    again = _json("latents stats again", capsys)
    offset, factor = dataset.description.affine
    # the same raw z, so the same sums to the last bit
    assert offset == pytest.approx(again["latents_mean"], rel=1e-12)
    assert [1 / value for value in factor] == pytest.approx(again["latents_std"], rel=1e-12)


def test_stats_refuses_constant_latents(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from sd_vae.checkpoints import load_vae

    vae = load_vae("start")
    torch.nn.init.zeros_(vae.quant_conv.weight)
    vae.register_to_config(scaling_factor=1.0)
    vae.save_pretrained("still")
    main(["encode", "still", "photos", "--out", "store", "--size", "16", "--workers", "0", "--content", "mode"])
    capsys.readouterr()

    assert main(["latents", "stats", "store", "--write", "still", "--convention", "channels"]) == 2
    assert "have no scale; measure more pictures" in capsys.readouterr().err


@pytest.mark.usefixtures("store")
def test_preview_writes_two_sheets_and_prints_the_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latents", "preview", "store", "--vae", "start", "--out", "looks"]) == 0

    output = capsys.readouterr()
    assert output.out.startswith("latent_rgb_factors = [\n")
    assert "latent_rgb_factors_bias = [" in output.out
    assert "fitted to 3, measured on 1 others" in output.err
    for name in ("decoded", "linear"):
        with Image.open(f"looks/{name}.png") as sheet:
            assert sheet.size == (36, 36)  # two rows of two 16x16 pictures, 4 pixels between


@pytest.mark.usefixtures("store")
def test_preview_prints_what_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json("latents preview store --vae start --out looks", capsys)

    assert found == json.loads(Path("looks/preview.json").read_text())
    assert (found["num_fitted"], len(found["latent_rgb_factors"]), len(found["latent_rgb_factors_bias"])) == (3, 4, 3)


@pytest.mark.usefixtures("store")
def test_preview_replaces_only_a_preview(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["latents", "preview", "store", "--vae", "start", "--out", "looks", "--overwrite"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    Path("looks/diary.txt").write_text("dear diary")
    capsys.readouterr()

    assert main(arguments) == 2
    assert "is not a preview (it holds diary.txt)" in capsys.readouterr().err


BAD = [
    ("latents veryfy store", "unknown action 'veryfy' of sd-vae latents; choose one of: verify, stats"),
    ("latents verify", "missing: STORE"),
    ("latents verify photos", "photos is not a latent store"),
    ("latents verify store --data photos", "--data is given and --vae is not"),
    ("latents verify store --samples 0", "--samples is 0, it must be at least 1"),
    ("latents stats photos", "photos is not a latent store"),
    ("latents stats store --confidence 2", "confidence is 2.0, it must be above 0 and below 1"),
    ("latents stats store --write nope", "there is nothing at nope"),
    ("latents stats store --write other", "store was made by the encoder"),
    ("latents stats store --write start/diffusion_pytorch_model.safetensors --new-encoder", "a single file carries no"),
    ("latents preview store --out o", "missing: --vae"),
    ("latents preview store --vae start --out o --pictures 1", "--pictures is 1, it must be at least 2"),
    ("latents preview store --vae start --out o --side 0", "--side is 0, it must be at least 1"),
    ("latents preview store --vae other --out o", "give the VAE that made it, or one that differs in its decoder"),
    ("latents preview store --vae start --out photos", "photos exists; choose another place or pass --overwrite"),
    ("latents preview store --vae start --out photos --overwrite", "photos exists and is not a preview (it holds 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[arguments for arguments, _ in BAD])
@pytest.mark.usefixtures("store")
def test_latents_refuses_bad_input_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from sd_vae.checkpoints import load_vae

    vae = load_vae("start")
    vae.encoder.conv_in.bias.data.add_(1)
    vae.save_pretrained("other")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    assert main(arguments.split()) == 2

    output = capsys.readouterr()
    assert message in output.err
    assert output.err.splitlines()[-1].startswith("error: ")
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
