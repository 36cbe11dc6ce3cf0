"""Every shipped recipe runs: a few steps of it with a tiny network, small crops and no downloads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from training import load_recipe, train
from training.config import RECIPES, TrainConfig
from training.records import read_metrics

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture
def tiny(make_config: Any) -> Any:
    """Return a function that shrinks a recipe and leaves its objective and what it trains as they are."""

    def shrink(name: str) -> TrainConfig:
        recipe, small = load_recipe(name), make_config(name)
        loss, adversarial = recipe.loss, recipe.loss.adversarial
        starts_late = adversarial.start_step > 0
        adversarial = dataclasses.replace(adversarial, start_step=int(starts_late), width=8, num_layers=1)
        return dataclasses.replace(
            recipe,
            out=small.out,
            steps=3,
            batch_size=2,
            gradient_accumulation_steps=min(2, recipe.gradient_accumulation_steps),
            mixed_precision="no",
            log_every=1,
            tensorboard=False,
            num_validation_images=1,
            data=dataclasses.replace(small.data, crop_scale=recipe.data.crop_scale),
            model=dataclasses.replace(recipe.model, pretrained=small.model.pretrained, preset="mini"),
            loss=dataclasses.replace(
                loss,
                perceptual=dataclasses.replace(loss.perceptual, weight=0.0),
                adversarial=adversarial,
                equivariance=dataclasses.replace(loss.equivariance, min_scale=0.5),
            ),
        )

    return shrink


@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs(tiny: Any, name: str) -> None:
    config = tiny(name)

    result = train(config)

    rows = [row for row in read_metrics(result.folder / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    assert result.report["skipped_steps"] == 0
    assert ("disc_loss" in rows[-1]) == (config.loss.adversarial.weight > 0)
    assert ("logvar" in rows[-1]) == config.loss.learn_logvar
    frozen = config.model.trainable != "all"
    assert result.report["latents"]["encoder"] == ("unchanged" if frozen else "changed")


def test_from_scratch_goes_on_at_512_from_its_result_and_measures_its_scale_anew(tiny: Any) -> None:
    first = tiny("from_scratch")
    first = train(dataclasses.replace(first, model=dataclasses.replace(first.model, pretrained=None)))
    second = tiny("from_scratch_512")

    result = train(dataclasses.replace(second, model=dataclasses.replace(second.model, pretrained=str(first.vae))))

    assert first.report["scaling_factor_source"].startswith("1 / standard deviation")
    assert result.report["scaling_factor_source"].startswith("1 / standard deviation")
    assert result.report["scaling_factor"] != first.report["scaling_factor"]


def test_equivariance_is_measured_before_and_after(tiny: Any) -> None:
    latents = train(tiny("eq_vae")).report["latents"]

    assert latents["equivariance"].keys() == {"before", "after"}
    assert latents["equivariance"]["before"] != latents["equivariance"]["after"]


def test_a_decoder_only_run_certifies_its_encoder_in_the_metadata(tiny: Any) -> None:
    result = train(tiny("finetune_ema"))

    with safe_open(Path(result.vae) / "diffusion_pytorch_model.safetensors", "pt") as file:
        latents = json.loads(file.metadata()["training"])["latents"]
    assert latents["encoder"] == "unchanged"
    assert "a drop-in for every model" in latents["certificate"]
    card = (result.vae / "README.md").read_text()
    assert "a drop-in for every model" in card
    assert latents["encoder_sha256"] in card
    assert "trained: decoder and post_quant_conv" in card
    assert "x KL" not in card


def test_a_run_that_moves_the_encoder_reports_the_drift_of_each_channel(tiny: Any) -> None:
    result = train(tiny("ldm_kl_f8"))

    drift = result.report["latents"]["drift"]
    assert {name: len(values) for name, values in drift.items()} == {"shift": 4, "scale": 4, "correlation": 4}
    card = (result.vae / "README.md").read_text()
    assert all(f"channel {channel}: {shift:+.3f}, " in card for channel, shift in enumerate(drift["shift"]))
