"""A VAE that is left out: the one that ships runs, and says so; what was given is never taken for something else."""

import hashlib
import json
from pathlib import Path

import pytest

from sd_vae import weights
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.cli import default_vae, main


@pytest.fixture
def shipped(place: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workplace, in an installation that brings `mini`: the VAE of `start`."""
    folder = place.parent / f"{place.name}_root" / "mini"
    folder.mkdir(parents=True)
    for path in Path("start").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))
    monkeypatch.setattr(default_vae, "shipped_folder", lambda name: weights.shipped_folder(name, folder.parent))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        "reconstruct photos/0.png --out o --json",
        "reconstruct photos/0.png photos/1.png --out o --json",
        "reconstruct photos --out o --json",
        "reconstruct photos mixed/1.png --out o --json",
        "encode photos --out o --size 16 --workers 0 --json",
        "inspect --json",
        "eval photos --out o --metrics psnr_db --codecs --device cpu --json",
    ],
)
def test_a_vae_that_is_left_out_is_the_shipped_one(
    arguments: str, shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(arguments.split())

    output = capsys.readouterr()
    assert code == 0, output.err
    assert output.err.count("no VAE is given: taking mini, which ships with sd-vae.") == 1
    assert json.loads(output.out)


def test_decode_without_a_vae_takes_the_shipped_one(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "photos", "--out", "store", "--size", "16", "--workers", "0"]) == 0

    code = main(["decode", "store", "--out", "o"])

    assert code == 0, capsys.readouterr().err
    assert len(list(Path("o").glob("*.png"))) == 4


@pytest.mark.parametrize("arguments", ["reconstruct start photos/0.png --out o", "inspect start"])
def test_a_vae_that_is_given_is_taken(arguments: str, shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shipped / "config.json").write_text("damaged")

    code = main(arguments.split())

    output = capsys.readouterr()
    assert code == 0, output.err
    assert "no VAE is given" not in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("encode", "error: missing: VAE, DATA, --out PATH. See sd-vae encode --help.\n"),
        ("encode start photos", "error: missing: --out PATH. See sd-vae encode --help.\n"),
        ("inspect start --confg x", "unknown: --confg x; did you mean --config?"),
        ("reconstruct nope photos/0.png --out o", "there is nothing at nope; check the path"),
    ],
)
def test_other_mistakes_keep_their_own_words(
    arguments: str, message: str, shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(arguments.split())

    output = capsys.readouterr()
    assert code == 2
    assert message in output.err
    assert "mini would run" not in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect", "missing: VAE. See sd-vae inspect --help. Without a VAE, mini would run, but this installation of"),
        ("encode photos --out o", "missing: DATA. See sd-vae encode --help. Without a VAE, mini would run, but this"),
        ("reconstruct photos/0.png --out o", "no VAE is given. Without a VAE, mini would run, but this installation"),
    ],
)
def test_an_installation_without_weights_says_both_ways_out(
    arguments: str, message: str, shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shipped / "SHA256SUMS").unlink()

    code = main(arguments.split())

    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "vae/config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_a_vae_does_not_count_as_pictures(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()

    assert not default_vae.holds_pictures(tmp_path)


def test_damaged_weights_do_not_run(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shipped / "config.json").write_text("damaged")

    code = main(["inspect"])

    assert code == 2
    assert "config.json is damaged: its sha256 is" in capsys.readouterr().err
