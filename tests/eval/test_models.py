import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from eval.evaluator import evaluate
from eval.models import display_name, factor_of, load_autoencoder, require_autoencoder, weights_fingerprint
from sd_vae.errors import UserError

SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


@pytest.fixture
def build():
    """A tiny random model of a diffusers class."""

    def build_one(name):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if name == "AutoencoderTiny":
                widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
                return diffusers.AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
            if name == "AsymmetricAutoencoderKL":
                widths = {"down_block_out_channels": (8, 16), "up_block_out_channels": (16, 24)}
                return diffusers.AsymmetricAutoencoderKL(**SMALL, **widths)
            if name == "AutoencoderDC":
                widths = {"encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16)}
                layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
                blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
                return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, **widths, **layers, **blocks)
            if name == "ConsistencyDecoderVAE":
                return diffusers.ConsistencyDecoderVAE(
                    encoder_block_out_channels=(8, 16),
                    encoder_down_block_types=("DownEncoderBlock2D",) * 2,
                    encoder_norm_num_groups=4,
                    decoder_block_out_channels=(8, 16),
                    decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
                    decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
                    decoder_norm_num_groups=4,
                    decoder_layers_per_block=1,
                )
            return getattr(diffusers, name)(**SMALL, block_out_channels=(8, 16))

    return build_one


CLASSES = [
    "AutoencoderKL",
    "AsymmetricAutoencoderKL",
    "AutoencoderTiny",
    "VQModel",
    "ConsistencyDecoderVAE",
    "AutoencoderDC",
]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_saved_loaded_by_its_name_and_evaluated(name, build, photos, tmp_path):
    vae = build(name)
    vae.save_pretrained(tmp_path / "vae")

    loaded = load_autoencoder(tmp_path / "vae")
    result = evaluate({"loaded": loaded}, {"cat": photos["cat"]})

    assert name in {parent.__name__ for parent in type(loaded).__mro__}
    assert factor_of(loaded) == 2
    assert result.rows[0].photos[0].latent_shape[1:] == (13, 19)
    # also of the decoder that draws noise; ours instead of diffusers' AutoencoderKL differs in the last bits
    theirs = evaluate({"loaded": vae}, {"cat": photos["cat"]})
    assert result.rows[0].means == pytest.approx(theirs.rows[0].means, abs=1e-4 if name == "AutoencoderKL" else 0)
    assert bool(result.rows[0].latents.channel_kl) == (name not in ("AutoencoderTiny", "VQModel", "AutoencoderDC"))


def test_vector_quantised_latents_take_the_bits_of_their_indices(build, photos):
    vae = build("VQModel")

    row = evaluate([vae], {"astronaut": photos["astronaut"]}).rows[0]

    assert row.bits_per_pixel == 8 / 4  # 256 vectors, one a cell of 2x2 pixels


def test_single_file_of_taesd_is_known_by_its_tensors(tmp_path):
    vae = diffusers.AutoencoderTiny(latent_channels=16)
    save_file(vae.state_dict(), tmp_path / "tiny.safetensors")

    loaded = load_autoencoder(tmp_path / "tiny.safetensors")

    assert loaded.config.latent_channels == 16
    assert weights_fingerprint(loaded) == weights_fingerprint(vae)


def test_single_file_of_taesd_with_another_architecture_is_refused(build, tmp_path):
    save_file(build("AutoencoderTiny").state_dict(), tmp_path / "tiny.safetensors")

    with pytest.raises(UserError, match=r"looks like a TAESD and is none: .* and [0-9]+ more tensors do not fit"):
        load_autoencoder(tmp_path / "tiny.safetensors")


@pytest.mark.shared
def test_taesd_in_8_bits_loads_and_says_so(shared):
    file = shared / "weights" / "taesd.f8e4m3.safetensors"

    loaded = load_autoencoder(file)

    assert display_name(str(file)) == "taesd.f8e4m3 (8-bit weights)"
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 2_445_063
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_load_autoencoder_reads_ours_and_computes_in_half(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "vae")

    loaded = load_autoencoder(str(tmp_path / "vae"), dtype="bfloat16")

    assert type(loaded).__module__ == "sd_vae.autoencoder"
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert display_name(str(tmp_path / "vae")) == "vae"


def test_load_autoencoder_refuses_another_class(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))

    with pytest.raises(UserError, match="says _class_name 'UNet2DModel'; it must be one of: AutoencoderKL"):
        load_autoencoder(tmp_path)


def test_load_autoencoder_refuses_a_folder_without_weights(build, tmp_path):
    build("VQModel").save_config(tmp_path)

    with pytest.raises(UserError, match="cannot load the VQModel in"):
        load_autoencoder(tmp_path)


def test_load_autoencoder_lists_missing_tensors(build, tmp_path):
    vae = build("VQModel")
    vae.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in vae.state_dict().items() if name != "decoder.conv_out.bias"}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    with pytest.raises(
        UserError, match=r"does not hold the weights of its VQModel: decoder\.conv_out\.bias and 0 more"
    ):
        load_autoencoder(tmp_path)


def test_require_autoencoder_refuses_other_networks():
    with pytest.raises(UserError, match="'net' is a Linear, it must be one of diffusers' AutoencoderKL"):
        require_autoencoder("net", torch.nn.Linear(1, 1))


def test_weights_fingerprint_sees_values_names_and_dtype(tiny_vae):
    before = weights_fingerprint(tiny_vae)

    with torch.no_grad():
        tiny_vae.decoder.conv_out.bias[0] += 1e-3
    after = weights_fingerprint(tiny_vae)

    assert len({before, after, weights_fingerprint(tiny_vae.half())}) == 3
