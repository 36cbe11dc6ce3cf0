import subprocess
import sys

import pytest

from sd_vae.errors import UserError
from sd_vae.losses.config import KLConfig, LossConfig, PerceptualConfig
from sd_vae.validation import from_plain


def test_loss_config_is_the_sd_recipe_by_default():
    config = LossConfig()

    assert (config.reconstruction, config.perceptual.net, config.perceptual.weight) == ("l2", "auto", 1.0)
    assert config.kl == KLConfig(weight=2.08e-8, convention="mean")


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_perceptual_config_rejects_weight(weight):
    with pytest.raises(UserError, match=rf"perceptual\.weight is {weight}, it must be a finite number >= 0"):
        PerceptualConfig(weight=weight)


def test_kl_config_rejects_negative_weight():
    with pytest.raises(UserError, match=r"kl\.weight is -1e-06, it must be a finite number >= 0\."):
        KLConfig(weight=-1e-6)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"free_bits": -1.0}, r"kl.free_bits is -1.0, it must be a finite number >= 0"),
        ({"warmup_steps": -1}, r"kl.warmup_steps is -1, it must be at least 0"),
        ({"warmup_steps": 5, "cycle_steps": 9}, r"kl.warmup_steps is 5 and kl.cycle_steps 9, a cycle has its own"),
    ],
)
def test_kl_config_rejects(fields, match):
    with pytest.raises(UserError, match=match):
        KLConfig(**fields)


def test_perceptual_config_reports_all_problems_at_once():
    with pytest.raises(
        UserError, match=r"perceptual\.weight is -1.*; perceptual\.backbone is 'x\.pth' but .* ms_dssim"
    ):
        PerceptualConfig(net="ms_dssim", weight=-1.0, backbone="x.pth")


def test_perceptual_config_names_what_ms_ssim_is_called_now():
    with pytest.raises(UserError, match=r"perceptual.net is ms_ssim, which is the name of a metric; .* ms_dssim"):
        PerceptualConfig(net="ms_ssim")
    with pytest.raises(UserError, match=r"recipe: perceptual.net is 'ms_ssim', it should be .* or 'ms_dssim'"):
        from_plain(LossConfig, {"perceptual": {"net": "ms_ssim"}}, source="recipe")


def test_perceptual_config_rejects_empty_backbone():
    with pytest.raises(UserError, match=r"perceptual\.backbone is empty, name a file or leave it out"):
        PerceptualConfig(backbone="")


def test_perceptual_config_wants_to_know_whose_weights_they_are():
    with pytest.raises(UserError, match=r"perceptual\.backbone is 'x\.pth' but perceptual\.net is auto; say whose"):
        PerceptualConfig(backbone="x.pth")


def test_loss_config_names_the_path_of_a_wrong_value():
    with pytest.raises(UserError, match=r"recipe: perceptual\.net is 'vgg19', it should be 'vgg', 'alex'"):
        from_plain(LossConfig, {"perceptual": {"net": "vgg19"}}, source="recipe")


def test_loss_config_needs_no_torch():
    code = "import sys, sd_vae.losses.config, sd_vae.data.config; sys.exit('torch' in sys.modules)"

    finished = subprocess.run([sys.executable, "-c", code], check=False)

    assert finished.returncode == 0
