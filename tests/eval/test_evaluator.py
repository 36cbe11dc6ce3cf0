import io
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import eval as package
from eval.baselines import box_average
from eval.evaluator import evaluate
from eval.features import Features
from eval.latent_stats import LatentStats, LatentSums
from eval.metrics import psnr_db, ssim
from eval.models import weights_fingerprint
from eval.protocols import get_protocol
from eval.roundtrip import encode_picture
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError
from sd_vae.files import write_json


@pytest.fixture
def two_vaes(tiny_vae):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = AutoencoderKL(**{k: v for k, v in tiny_vae.config.items() if not k.startswith("_")})
    return {"ours": tiny_vae, "other": other.eval()}


def test_package_promises_evaluate():
    assert package.evaluate is evaluate
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_evaluate_measures_every_row_on_every_photo(two_vaes, photos, perceptual):
    result = evaluate(two_vaes, photos, perceptual=perceptual, box_blocks=(4, 2))

    assert [row.name for row in result.rows] == ["ours", "other", "4x4 box average", "2x2 box average"]
    assert [row.kind for row in result.rows] == ["vae", "vae", "box_average", "box_average"]
    assert list(result.metrics) == ["psnr_db", "ssim", "mean_difference"]
    for row in result.rows:
        assert [photo.name for photo in row.photos] == list(photos)
        assert all(set(photo.metrics) == set(result.metrics) for photo in row.photos)


def test_evaluate_numbers_are_those_of_the_pictures_it_returns(tiny_vae, photos):
    result = evaluate({"ours": tiny_vae}, photos, box_blocks=(4,))

    for index, (name, x) in enumerate(photos.items()):
        recon = result.pictures[name]["ours"].recon
        metrics = result.row("ours").photos[index].metrics
        assert metrics == {"psnr_db": psnr_db(recon, x), "ssim": ssim(recon, x)}
        box = result.row("4x4 box average").photos[index].metrics["psnr_db"]
        assert box == psnr_db(box_average(x, 4), x)


def test_evaluate_measures_perception_on_rounded_pictures(tiny_vae, photos, perceptual):
    result = evaluate([tiny_vae], {"cat": photos["cat"]}, perceptual=perceptual)

    levels = torch.tensor(list(result.pictures["cat"]["model 1"].recon.tobytes())).float()
    expected = (levels - torch.tensor(list(photos["cat"].tobytes())).float()).abs().mean() / 127.5
    assert result.rows[0].means["mean_difference"] == pytest.approx(float(expected), rel=1e-5)


def test_evaluate_means_are_means_of_photos(tiny_vae, photos):
    row = evaluate([tiny_vae], photos).rows[0]

    values = [photo.metrics["psnr_db"] for photo in row.photos]
    assert row.means["psnr_db"] == pytest.approx(sum(values) / 3, rel=1e-12)


def test_evaluate_does_not_depend_on_the_order_of_photos(tiny_vae, photos, perceptual):
    backwards = dict(reversed(photos.items()))

    one = evaluate([tiny_vae], photos, perceptual=perceptual, box_blocks=(4,))
    two = evaluate([tiny_vae], backwards, perceptual=perceptual, box_blocks=(4,))

    assert [(row.means, row.latents) for row in one.rows] == [(row.means, row.latents) for row in two.rows]


def test_evaluate_does_not_depend_on_the_other_models(two_vaes, photos):
    together = evaluate(two_vaes, photos)
    alone = evaluate({"other": two_vaes["other"]}, photos)

    assert together.row("other") == alone.row("other")


def test_evaluate_pools_latents_over_photos(tiny_vae, photos):
    latents = evaluate([tiny_vae], photos).rows[0].latents

    assert latents == LatentStats.pooled(
        [LatentSums.of(encode_picture(tiny_vae, x).posterior) for x in photos.values()]
    )


def test_evaluate_brings_photos_to_size(tiny_vae, photos):
    result = evaluate([tiny_vae], photos, size=24)

    assert {(photo.width, photo.height) for photo in result.photos} == {(24, 24)}
    assert result.rows[0].photos[0].latent_shape == (4, 12, 12)


def test_evaluate_reads_a_folder(tiny_vae, photos, tmp_path):
    for name, photo in photos.items():
        photo.save(tmp_path / f"{name}.png")

    from_files = evaluate([tiny_vae], tmp_path)
    from_memory = evaluate([tiny_vae], {f"{name}.png": photo for name, photo in sorted(photos.items())})

    assert from_files.to_dict() == from_memory.to_dict()


def test_evaluate_leaves_models_in_their_mode(tiny_vae, photos):
    tiny_vae.train()

    evaluate([tiny_vae], photos)

    assert tiny_vae.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny_vae.parameters())


def test_evaluate_keeps_few_pictures_and_hands_out_all(tiny_vae, photos):
    seen = []

    result = evaluate([tiny_vae], photos, max_pictures=1, on_pictures=lambda name, rows: seen.append((name, *rows)))

    assert list(result.pictures) == ["cat"]
    assert seen == [("cat", "model 1"), ("astronaut", "model 1"), ("coffee", "model 1")]


def test_evaluate_reports_progress_before_and_after_each_photo(tiny_vae, photos):
    calls = []

    evaluate([tiny_vae], photos, progress=lambda done, total: calls.append((done, total)))

    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_evaluation_as_plain_values_is_the_same_for_two_runs(two_vaes, photos, tmp_path):
    for name in ("one.json", "two.json"):
        write_json(tmp_path / name, evaluate(two_vaes, photos, box_blocks=(4,)).to_dict())

    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_evaluation_keeps_time_and_pictures_out_of_its_plain_values(tiny_vae, photos):
    result = evaluate([tiny_vae], photos)

    plain = result.to_dict()
    assert not {"pictures", "speed"} & set(plain)
    assert set(plain["rows"][0]["photos"][0]) == {"name", "metrics", "latent_shape"}
    assert result.speed["model 1"].photos_per_s == pytest.approx(3 / result.speed["model 1"].seconds)
    json.dumps(plain)


def test_evaluation_names_the_best_rows(two_vaes, photos, perceptual):
    result = evaluate(two_vaes, photos, perceptual=perceptual, box_blocks=(2,))

    assert result.best("psnr_db") == result.best("mean_difference") == {"2x2 box average"}
    assert evaluate([two_vaes["ours"]], photos).best("psnr_db") == set()


def test_evaluate_gives_infinite_psnr_for_a_perfect_reconstruction(tiny_vae):
    flat = Image.new("RGB", (16, 16), (7, 8, 9))

    result = evaluate([tiny_vae], {"flat": flat}, box_blocks=(16,))

    assert result.row("16x16 box average").means["psnr_db"] == math.inf


@pytest.mark.parametrize(
    ("vaes", "options", "message"),
    [
        ([], {}, "no model to evaluate"),
        (["a path"], {}, "'model 1' is a str, it must be one of diffusers' AutoencoderKL"),
        (3, {}, r"vaes is a int, .*pass \[vae\]"),
        (None, {"size": 0}, "size is 0 pixels"),
        (None, {"box_blocks": (4, 4)}, "two rows have one name"),
        (None, {"box_blocks": (0,)}, "0 pixels, it must be at least 1"),
    ],
)
def test_evaluate_refuses(vaes, options, message, tiny_vae, photos):
    with pytest.raises(UserError, match=message):
        evaluate([tiny_vae] if vaes is None else vaes, photos, **options)


def test_evaluate_refuses_a_model_that_is_not_for_rgb(tiny_vae, photos):
    config = {key: value for key, value in tiny_vae.config.items() if not key.startswith("_")}
    grey = AutoencoderKL(**config | {"in_channels": 1, "out_channels": 1})

    with pytest.raises(UserError, match="takes 1 channels and gives 1, photos have 3"):
        evaluate([grey], photos)


def test_evaluate_names_the_photo_that_is_too_small(tiny_vae):
    with pytest.raises(UserError, match="speck: SSIM needs pictures of at least 11x11"):
        evaluate([tiny_vae], {"speck": Image.new("RGB", (8, 8))})


def test_evaluate_names_the_photo_that_cannot_be_read(tiny_vae, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")

    with pytest.raises(UserError, match=r"cannot read the picture .*broken\.png"):
        evaluate([tiny_vae], tmp_path)


def test_evaluate_draws_each_photos_noise_from_the_seed_and_its_name(tiny_vae, photos):
    sampled = replace(get_protocol("pixels"), name="sampled", latents="sample")

    forwards = evaluate([tiny_vae], photos, protocol=sampled).rows[0]
    backwards = evaluate([tiny_vae], dict(reversed(photos.items())), protocol=sampled).rows[0]
    other_seed = evaluate([tiny_vae], photos, protocol=replace(sampled, seed=1)).rows[0]

    assert forwards.means == backwards.means
    assert forwards.intervals == backwards.intervals
    assert forwards.means != other_seed.means
    assert forwards.means != evaluate([tiny_vae], photos).rows[0].means


def test_evaluate_rounds_as_the_protocol_says(tiny_vae, photos):
    down = replace(get_protocol("pixels"), name="down", rounding="down")

    nearest = np.asarray(evaluate([tiny_vae], photos).pictures["cat"]["model 1"].recon, int)
    lower = np.asarray(evaluate([tiny_vae], photos, protocol=down).pictures["cat"]["model 1"].recon, int)

    assert set(np.unique(nearest - lower)) == {0, 1}


def test_evaluate_lists_photos_that_cannot_be_read_and_counts_the_others(tiny_vae, photos, tmp_path):
    photos["cat"].save(tmp_path / "cat.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")

    result = evaluate([tiny_vae], tmp_path)

    assert [(reject.name, len(result.photos)) for reject in result.rejects] == [("broken.png", 1)]
    assert "no picture format is recognised" in result.rejects[0].reason
    with pytest.raises(UserError, match=r"broken\.png: cannot read the picture"):
        evaluate([tiny_vae], tmp_path, strict=True)


def test_evaluate_stamps_the_photos_and_the_weights(two_vaes, photos):
    result = evaluate(two_vaes, photos)
    fewer = evaluate(two_vaes, {name: photos[name] for name in ("cat", "coffee")})

    assert result.protocol["name"] == "pixels"
    assert result.protocol["photos sha256"] != fewer.protocol["photos sha256"]
    assert [row.fingerprint for row in result.rows] == [weights_fingerprint(vae) for vae in two_vaes.values()]


def test_evaluate_compares_the_first_row_with_every_other(two_vaes, photos):
    result = evaluate(two_vaes, photos, box_blocks=(1,))

    assert [(one.against, one.metric) for one in result.comparisons] == [
        (name, metric) for name in ("other", "1x1 box average") for metric in ("psnr_db", "ssim")
    ]
    ours, other = result.rows[0].means["ssim"], result.rows[1].means["ssim"]
    assert result.comparisons[1].difference.value == pytest.approx(ours - other, rel=1e-9)


def test_evaluate_gives_codecs_the_bits_of_the_latents(tiny_vae, photos):
    large = {"cat": photos["cat"].resize((200, 120))}

    result = evaluate([tiny_vae], large, codecs=("JPEG", "WebP"))

    vae, jpeg, webp = (row.bits_per_pixel for row in result.rows)
    assert vae == 4 * 16 / 4  # 4 channels of 16 bits a cell of 2x2 pixels
    assert 0.1 < jpeg <= vae
    assert 0.1 < webp <= vae
    assert {plot.metric: len(plot.lines) for plot in result.plots} == {"psnr_db": 3}


def test_evaluate_measures_frechet_distances_of_the_set(tiny_vae, photos, monkeypatch):
    class Colour(Features):
        name, num_features, sha256 = "inception", 3, "0" * 64

        def forward(self, pixels):
            return pixels.float().mean(dim=(2, 3))

    monkeypatch.setattr("eval.features.build_features", lambda net, file: Colour())

    result = evaluate([tiny_vae], photos, metrics=["rfid", "psnr_db"], box_blocks=(1,))

    assert result.row("1x1 box average").pooled["rfid"] == pytest.approx(0.0, abs=1e-6)
    assert result.rows[0].pooled["rfid"] > 1.0
    assert result.protocol["rfid weights"] == "0" * 64


def test_evaluate_reads_parquet(tiny_vae, photos, tmp_path):
    contents = []
    for photo in photos.values():
        buffer = io.BytesIO()
        photo.save(buffer, "png")
        contents.append({"bytes": buffer.getvalue(), "path": None})
    pyarrow.parquet.write_table(pyarrow.table({"image": contents}), tmp_path / "photos.parquet")

    from_table, from_memory = evaluate([tiny_vae], tmp_path / "photos.parquet"), evaluate([tiny_vae], photos)

    assert from_table.rows[0].means == from_memory.rows[0].means
    assert [photo.name for photo in from_table.photos] == [f"photos.parquet/{index}" for index in range(3)]
