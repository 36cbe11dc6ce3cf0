"""The evaluation inside a training: the numbers of `evaluate`, what is left out, report and model card."""

import json
import logging
from dataclasses import replace

import pytest

from eval.evaluator import evaluate
from eval.metrics import METRICS
from eval.protocols import get_protocol
from eval.validation import Validator
from sd_vae.errors import UnreachableError, UserError
from training.config_extras import BEST_METRICS


class Photos:
    """Named pictures by number, as a training holds them."""

    spec = "photos"

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def load(self, index):
        return list(self.pictures.values())[index]

    def name(self, index):
        return f"folder/{list(self.pictures)[index]}"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No metric network is at hand."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def images(photos):
    return Photos(photos)


def test_a_validation_is_an_evaluation(tiny_vae, images, photos):
    validated = Validator("native", size=20)(tiny_vae, images)

    row = evaluate([tiny_vae], photos, protocol="native", size=20, metrics=["psnr_db", "ssim", "l1"]).rows[0]
    assert {name: validated.values[name] for name in row.means} == row.means
    assert validated.values["pooled_psnr_db"] == row.pooled["pooled_psnr_db"]
    assert validated.values["kl_per_element"] == row.latents.kl_per_element
    assert validated.picture is None


def test_a_validation_leaves_the_model_as_it_was(tiny_vae, images):
    Validator(size=20)(tiny_vae.train(), images)

    assert tiny_vae.training


def test_what_cannot_be_measured_is_left_out_and_said_once(tiny_vae, images, caplog):
    validator = Validator("coco5k-256", size=20)
    small = Validator(size=8)

    with caplog.at_level(logging.INFO):
        validator(tiny_vae, images)
        validator(tiny_vae, images)

    assert validator.protocol.size == 256
    assert not {"lpips_vgg", "rfid"} & set(validator.protocol.metrics)
    assert [record.getMessage() for record in caplog.records] == [
        "validation by coco5k-256 leaves out lpips_vgg: the weights of vgg are not in the torch hub cache; "
        "rfid: the weights of inception are not in the torch hub cache"
    ]
    assert "ssim" not in small.protocol.metrics


def test_one_photo_has_no_frechet_distance(tiny_vae, photos, caplog, monkeypatch):
    monkeypatch.setattr("eval.validation.has_weights", lambda net: True)
    monkeypatch.setattr("eval.validation.build_measures", lambda *_, **__: None)
    validator = Validator(replace(get_protocol("native"), metrics=("psnr_db", "rfid")), size=20)

    with caplog.at_level(logging.INFO):
        values = validator(tiny_vae, Photos({"cat": photos["cat"]})).values

    assert "rfid" not in values
    assert "rfid: it needs at least 2 photos" in caplog.text


def test_a_validation_writes_report_and_card(tiny_vae, images, tmp_path):
    validated = Validator(size=20)(tiny_vae, images, folder=tmp_path / "evaluation")

    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {
        "report.html",
        "report.json",
        "per_image.csv",
    }
    means = report["evaluation"]["rows"][0]["means"]
    assert means == {name: validated.values[name] for name in means}
    assert [row["name"] for row in report["evaluation"]["rows"]] == ["VAE", "JPEG at equal bits", "WebP at equal bits"]
    assert [photo["name"] for photo in report["evaluation"]["photos"]] == ["cat", "astronaut", "coffee"]
    assert "3 validation photos by protocol `native at 20`, version 1" in validated.card
    assert f"| PSNR (dB) ↑ | {METRICS['psnr_db'].format(means['psnr_db'])} [" in validated.card
    assert "- photo: upright 8-bit sRGB; size: shorter side to 20 (bicubic" in validated.card
    assert validated.picture.size == (3 * 20 + 2 * 8, 3 * 20 + 2 * 8)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match="unknown protocol 'best'; choose one of: pixels, native"):
        Validator("best", size=16)


def test_damaged_weights_show_before_the_training(tmp_path):
    (tmp_path / "alex.pth").write_bytes(b"no weights")

    with pytest.raises(UserError, match=r"alex\.pth"):
        Validator(size=64, weights={"alex": str(tmp_path / "alex.pth")})


def test_best_weights_are_chosen_in_the_direction_of_the_metric():
    table = {name: better for name, better in BEST_METRICS.items() if not name.startswith("loss/")}

    assert table == {name: METRICS[name].higher_is_better for name in table}


def test_photos_that_are_gone_are_listed_and_the_others_measured(tiny_vae, images, photos):
    def load(index):
        if index == 0:
            raise UserError("cannot read the picture cat.")
        return list(photos.values())[index]

    images.load = load

    values = Validator(size=20)(tiny_vae, images).values

    rest = {name: photos[name] for name in ("astronaut", "coffee")}
    assert (
        values["psnr_db"]
        == evaluate([tiny_vae], rest, protocol="native", size=20, metrics=["psnr_db"]).rows[0].means["psnr_db"]
    )


def test_photos_out_of_reach_end_the_validation(tiny_vae, images):
    def load(index):
        raise UnreachableError("no route to the photos.")

    images.load = load

    with pytest.raises(UnreachableError, match="no route to the photos"):
        Validator(size=20)(tiny_vae, images)


def test_a_card_of_one_photo_has_no_interval(tiny_vae, photos):
    card = Validator(size=20)(tiny_vae, Photos({"cat": photos["cat"]})).card

    assert "[" not in card.partition("\n| PSNR")[2].partition("What the protocol says")[0]
