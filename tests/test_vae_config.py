"""The config: presets, diffusers' files old and new, every problem by name, and no torch in sight."""

import json
import subprocess
import sys

import pytest

from sd_vae.config import PRESETS, VAEConfig
from sd_vae.errors import UserError

TWO_LEVELS = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}

SD_VAE_FT_MSE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
"""The config.json of stabilityai/sd-vae-ft-mse, written before there was a scaling factor."""


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_survives_json(preset) -> None:
    plain = json.loads(json.dumps(PRESETS[preset].to_dict()))

    assert VAEConfig.from_dict(plain) == PRESETS[preset]


def test_presets_differ_in_what_the_families_differ_in() -> None:
    names = ("latent_channels", "scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv", "factor")

    rows = {name: tuple(getattr(config, key) for key in names) for name, config in PRESETS.items()}

    assert rows == {
        "sd1": (4, 0.18215, None, True, True, 8),
        "sdxl": (4, 0.13025, None, True, True, 8),
        "sd3": (16, 1.5305, 0.0609, False, False, 8),
        "flux": (16, 0.3611, 0.1159, False, False, 8),
        "mini": (4, 1.0, None, True, True, 8),
    }


def test_from_preset_rejects_an_unknown_name() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'sd9'; choose one of: sd1, sdxl, sd3, flux, mini\."):
        VAEConfig.from_preset("sd9")


def test_from_dict_reads_the_config_of_diffusers() -> None:
    import torch

    from sd_vae._diffusers import DiffusersAutoencoderKL

    with torch.device("meta"):
        theirs = DiffusersAutoencoderKL(**PRESETS["sd3"].to_dict())

    assert VAEConfig.from_dict(json.loads(theirs.to_json_string())) == PRESETS["sd3"]


def test_from_dict_fills_what_old_files_leave_out() -> None:
    config = VAEConfig.from_dict(SD_VAE_FT_MSE)

    assert config.scaling_factor == 0.18215
    assert config.sample_size == 256
    assert config.mid_block_add_attention
    assert config.use_quant_conv


def test_from_dict_takes_a_pair_as_sample_size_and_an_integer_as_scale() -> None:
    config = VAEConfig.from_dict({"sample_size": [64, 96], "scaling_factor": 1})

    assert config.sample_size == (64, 96)
    assert config.scaling_factor == 1.0


def test_act_fn_is_read_in_any_case_as_diffusers_does() -> None:
    assert VAEConfig(act_fn="SiLU").act_fn == "SiLU"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_out_channels": []}, r"block_out_channels is empty, give one width a level"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, r"up_block_types has 3 entries and block_out_channels 2"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "DownBlock2D"]},
            r"down_block_types holds 'DownBlock2D', choose from DownEncoderBlock2D, AttnDownEncoderBlock2D",
        ),
        ({"act_fn": "sigmoid"}, r"act_fn is 'sigmoid', choose from silu, swish, mish, gelu, relu"),
        ({"in_channels": 0}, r"in_channels is 0, it must be at least 1"),
        ({"out_channels": -1}, r"out_channels is -1, it must be at least 1"),
        ({"layers_per_block": 0}, r"layers_per_block is 0, it must be at least 1"),
        ({"latent_channels": 0}, r"latent_channels is 0, it must be at least 1"),
        ({"norm_num_groups": 0}, r"norm_num_groups is 0, it must be at least 1"),
        ({"block_out_channels": [32, 33]}, r"block_out_channels holds 33, which norm_num_groups 32 does not divide"),
        ({"block_out_channels": [0, 32]}, r"block_out_channels holds 0, which norm_num_groups 32 does not divide"),
        ({"sample_size": 0}, r"sample_size is 0, it must be at least 1"),
        ({"sample_size": [64, -1]}, r"sample_size is \(64, -1\), it must be at least 1"),
        ({"scaling_factor": 0.0}, r"scaling_factor is 0.0, it must be above 0 and finite"),
        ({"scaling_factor": float("nan")}, r"scaling_factor is nan, it must be above 0 and finite"),
        ({"scaling_factor": float("inf")}, r"scaling_factor is inf, it must be above 0 and finite"),
        ({"shift_factor": float("nan")}, r"shift_factor is nan, it must be finite"),
        ({"latents_mean": [0.0] * 4}, r"latents_mean and latents_std come together, give both or neither"),
        (
            {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
            r"latents_mean has 3 entries, latent_channels is 4",
        ),
        (
            {"latents_mean": [0.0, 0.0, 0.0, float("inf")], "latents_std": [1.0] * 4},
            r"latents_mean is \(0.0, 0.0, 0.0, inf\), every entry must be finite",
        ),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, 0.0]},
            r"latents_std is \(1.0, 1.0, 1.0, 0.0\), every entry must be above 0 and finite",
        ),
        ({"latent_chanels": 4}, r"unknown key 'latent_chanels', did you mean 'latent_channels'\?"),
        ({"zebra": 4}, r"unknown key 'zebra', known here: in_channels, out_channels"),
        ({"latent_channels": "4"}, r"latent_channels is '4', it should be a valid integer"),
        ({"force_upcast": 1}, r"force_upcast is 1, it should be a valid boolean"),
        ({"scaling_factor": True}, r"scaling_factor is True, it should be a valid number"),
        ({"block_out_channels": [32, "wide"]}, r"block_out_channels\.1 is 'wide', it should be a valid integer"),
        ({"sample_size": "big"}, r"sample_size.* is 'big', it should be"),
        ({"block_out_channels": None}, r"block_out_channels is None, it should be a valid (tuple|array)"),
    ],
)
def test_from_dict_names_the_problem(fields, message) -> None:
    with pytest.raises(UserError, match=message):
        VAEConfig.from_dict(TWO_LEVELS | fields)


def test_from_dict_reports_all_problems_at_once_under_their_source() -> None:
    with pytest.raises(UserError, match=r"^config\.json: .*act_fn.*; .*layers_per_block.*\.$"):
        VAEConfig.from_dict({"act_fn": "sigmoid", "layers_per_block": 0}, source="config.json")


def test_problem_is_one_line_that_ends_with_a_full_stop() -> None:
    with pytest.raises(UserError) as raised:
        VAEConfig.from_dict(TWO_LEVELS | {"act_fn": 3, "latent_channels": None, "typo": 1})

    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")
    assert str(raised.value).count(";") == 2


@pytest.mark.parametrize("module", ["sd_vae", "sd_vae.config", "sd_vae.cli", "sd_vae.checks", "sd_vae.validation"])
def test_import_is_cheap(module) -> None:
    script = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'pydantic', 'PIL'}} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_help_of_the_command_line_is_cheap() -> None:
    script = (
        "import sys; from sd_vae.cli import main; main(['--help']); print({'torch', 'diffusers'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "set()"
