"""How what ships is made: data, curve, release and bars, on tiny models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model
from torch import Tensor, nn

from benchmarks import mini_bars, mini_curve, mini_data, mini_release
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae
from sd_vae.data import open_source
from sd_vae.errors import UserError
from training import load_recipe
from training.config import save_recipe


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two folders of 40 pictures of noise, which no compression makes smaller."""
    pixels = np.random.default_rng(0)
    for index in range(80):
        path = tmp_path / "photos" / ("many" if index % 2 else "diverse") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def pictures(photos: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(photos.rglob("*.png"))[:3]]


def names(folder: Path) -> list[str]:
    source = open_source(str(folder))
    return [source._row(index)["path"] for index in range(len(source))]


def test_pack_holds_photos_out_by_name(photos: Path, tmp_path: Path) -> None:
    counts = mini_data.pack(photos, tmp_path / "data", repeats={})

    held_out = names(tmp_path / "data" / "holdout")
    assert all(map(mini_data.is_held_out, held_out))
    assert counts == {"train": 80 - len(held_out), "holdout": len(held_out)}
    assert 1 <= len(held_out) <= 10
    assert not set(held_out) & set(names(tmp_path / "data" / "train"))


def test_pack_repeats_rows_but_not_bytes(photos: Path, tmp_path: Path) -> None:
    mini_data.pack(photos, tmp_path / "data", repeats={"diverse": 5})

    rows = names(tmp_path / "data" / "train")
    assert {rows.count(name) for name in rows if name.startswith("diverse")} == {5}
    assert {rows.count(name) for name in rows if name.startswith("many")} == {1}
    stored = sum(path.stat().st_size for path in (tmp_path / "data" / "train").iterdir())
    # 1.02 here, for names and headers; repeated bytes would make it 3
    assert stored < 1.1 * sum((photos / name).stat().st_size for name in set(rows))


def test_pack_splits_files_that_would_be_too_large(photos: Path, tmp_path: Path) -> None:
    paths = sorted(photos.rglob("*.png"))

    mini_data.write_tables([path for path in paths for _ in range(2)], tmp_path / "data", max_bytes=100_000)

    files = sorted((tmp_path / "data").iterdir())
    assert len(files) > 3
    assert max(path.stat().st_size for path in files) < 110_000
    assert len(open_source(str(tmp_path / "data"))) == 160


def test_pack_refuses_a_folder_that_is_not_there(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no folder nope to repeat"):
        mini_data.pack(photos, tmp_path / "data", repeats={"nope": 2})


def test_pack_leaves_what_is_there(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists; choose another place"):
        mini_data.pack(photos, tmp_path, repeats={})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of `mini` with two checkpoints, one of them without averaged weights."""
    folder = tmp_path / "run"
    vae = AutoencoderKL.from_preset("mini")
    for step, name in ((20, "ema"), (100, "model")):
        (folder / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
        save_model(vae, str(folder / "checkpoints" / f"step-{step:07d}" / f"{name}.safetensors"))
    save_recipe(load_recipe("demo"), folder / "config.yaml")
    return folder


def test_curve_has_every_checkpoint_once(run: Path, pictures: list[Image.Image]) -> None:
    first = list(mini_curve.extend_curve(run, pictures, None))
    second = list(mini_curve.extend_curve(run, pictures, None))

    assert [row["step"] for row in first] == ["20", "100"]
    assert second == []
    assert mini_curve.read_curve(run) == first


def test_seen_pixels_are_counted_in_crops(run: Path) -> None:
    (run / "metrics.jsonl").write_text(
        '{"step": 5, "samples": 40, "loss": 1.0}\n{"step": 10, "samples": 80, "loss": 1.0}\n'
    )
    size = load_recipe(run / "config.yaml").data.size

    assert mini_curve.seen_megapixels(run) == {5: 40 * size**2 / 1e6, 10: 80 * size**2 / 1e6}


def test_the_legs_are_drawn_as_one_curve(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 100, "samples": 400, "loss": 1.0}\n')
    (run / "holdout.csv").write_text("step,saved,psnr_db,lpips_alex\n20,x,20.1,0.5\n100,x,21.0,0.4\n")

    mini_curve.plot_curve([run, run], tmp_path / "curve.png")

    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (1200, 420)


def test_measure_compares_pictures_of_eight_bits(tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = Image.new("RGB", (16, 16), (100, 100, 100))
    monkeypatch.setattr(tiny_vae, "_decode", lambda z: torch.full((1, 3, 16, 16), 2 * 110.4 / 255 - 1))

    values = mini_curve.measure(tiny_vae, [grey, grey], None)

    assert values == {"psnr_db": pytest.approx(20 * np.log10(255 / 10))}


def test_central_square_does_not_resize() -> None:
    image = Image.fromarray(np.arange(48 * 40, dtype=np.uint8).reshape(40, 48)).convert("RGB")

    square = mini_curve.central_square(image, 44)

    assert square.size == (44, 40)
    assert square.getpixel((0, 0)) == image.getpixel((2, 0))


def test_every_other_takes_each_photo_once(tmp_path: Path) -> None:
    for index, colour in enumerate((0, 50, 100, 150, 200)):
        (tmp_path / "photos" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 280), (colour,) * 3).save(tmp_path / "photos" / str(index % 2) / f"{index}.png")
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    mini_data.write_tables([path for path in paths for _ in range(3)], tmp_path / "tables", max_bytes=10**6)
    source = open_source(str(tmp_path / "tables"))

    parts = [[picture.getpixel((0, 0))[0] for picture in mini_release.every_other(source, first)] for first in (0, 1)]

    assert parts == [[0, 200, 150], [100, 50]]  # folder 0 holds 0, 100, 200
    assert {picture.size for picture in mini_release.every_other(source, 0)} == {(256, 256)}


@torch.no_grad()
def test_balance_gives_every_channel_unit_variance(tiny_vae: AutoencoderKL, pictures: list[Image.Image]) -> None:
    tiny_vae.quant_conv.weight[0] *= 30
    tiny_vae.quant_conv.bias[1] += 5
    before = mini_release.latent_moments(tiny_vae, pictures)

    balanced = mini_release.balance(tiny_vae, before)

    after = mini_release.latent_moments(balanced, pictures)
    latents_std = after.std * balanced.config.scaling_factor
    assert float(before.std.max() / before.std.min()) > 5
    # worst seen 4e-7 and 2e-7: weights are stored in float32
    torch.testing.assert_close(latents_std, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(after.mean, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-5)
    assert balanced.config.latents_mean is None


@torch.no_grad()
def test_balance_keeps_reconstructions(tiny_vae: AutoencoderKL, pictures: list[Image.Image]) -> None:
    x = mini_release.to_tensor(pictures[0])
    balanced = mini_release.balance(tiny_vae, mini_release.latent_moments(tiny_vae, pictures))

    ours, theirs = balanced(x).sample, tiny_vae(x).sample

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))  # worst seen 8e-7


def test_latent_moments_count_the_posteriors_variance(tiny_vae: AutoencoderKL, pictures: list[Image.Image]) -> None:
    with torch.no_grad():
        tiny_vae.quant_conv.weight.zero_()
        tiny_vae.quant_conv.bias.copy_(torch.tensor([1.0, 2, 3, 4] + [2 * np.log(0.5)] * 4))

    moments = mini_release.latent_moments(tiny_vae, pictures)

    torch.testing.assert_close(moments.mean.float(), torch.tensor([1.0, 2, 3, 4]))
    torch.testing.assert_close(moments.std.float(), torch.full((4,), 0.5))


def test_release_writes_what_load_vae_takes(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    folder = mini_release.release(tiny_vae, "# card\n", tmp_path / "mini")

    vae = load_vae(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert all(torch.equal(a, b.half().float()) for a, b in zip(vae.parameters(), tiny_vae.parameters(), strict=True))


def test_release_replaces_what_was_released(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    mini_release.release(tiny_vae, "# card\n", tmp_path / "mini")

    folder = mini_release.release(tiny_vae, "# another card\n", tmp_path / "mini", overwrite=True)

    assert (folder / "README.md").read_text() == "# another card\n"


def test_release_refuses_what_is_too_large(tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(mini_release, "MAX_MB", 0.01)

    with pytest.raises(UserError, match=r"parameters are 0\.\d MB in fp16, what ships has at most 0\.01 MB"):
        mini_release.release(tiny_vae, "# card\n", tmp_path / "mini")


class Mean(nn.Module):
    """Stands for a VAE whose encoder commutes with everything: z is the mean of 2x2 pixels."""

    device = torch.device("cpu")

    def encode(self, x: Tensor) -> "Mean":
        self.z = torch.nn.functional.avg_pool2d(x, 2)
        return self

    @property
    def latent_dist(self) -> "Mean":
        return self

    def mode(self) -> Tensor:
        return self.z


def test_equivariance_errors_are_zero_where_nothing_is_lost(pictures: list[Image.Image]) -> None:
    errors = mini_bars.equivariance_errors(Mean(), pictures)

    assert errors.keys() == {"downscaling", "horizontal flip", "vertical flip"}
    assert max(errors.values()) < 1e-6


def test_equivariance_errors_see_an_encoder_that_shifts(pictures: list[Image.Image]) -> None:
    class Shifted(Mean):
        def mode(self) -> Tensor:
            return self.z.roll(1, dims=3)

    errors = mini_bars.equivariance_errors(Shifted(), pictures)

    # of noise every cell is unrelated to its neighbour: sqrt(2), times half the deviation after 2x downscaling
    assert errors["horizontal flip"] == pytest.approx(2**0.5, rel=0.1)
    assert errors["vertical flip"] < 1e-6


def test_figures_are_ratios_of_which_more_is_better() -> None:
    ours = {"psnr_db": 25.5, "lpips_alex": 0.1, "ssim": 0.7}
    taesd = {"psnr_db": 24.3, "lpips_alex": 0.12, "ssim": 0.68}

    figures = mini_bars.to_figures(ours, taesd, (1.0, 2.0), [0.95, 1.02])

    assert [figure.value for figure in figures] == pytest.approx([1.2, 1.2, 2.0, 2.0])
    assert [figure.verdict for figure in figures] == ["met, aim missed", "met, aim missed", "met", "met"]


def test_seconds_are_of_both_models(tiny_vae: AutoencoderKL) -> None:
    ours, theirs = mini_bars.seconds([tiny_vae, tiny_vae], 16, 2)

    assert min(ours, theirs) > 0
