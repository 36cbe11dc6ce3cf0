"""The class by itself: what it returns, what it refuses, what its switches do."""

import inspect

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput

import sd_vae
from sd_vae import PRESETS, AutoencoderKL, DiagonalGaussian, UserError, VAEConfig, ops
from sd_vae._diffusers import DiffusersAutoencoderKL


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(3, 3, 16, 24) * 2 - 1


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(3, 4, 8, 12)


def test_arguments_are_the_fields_of_the_config() -> None:
    ours = {name: value.default for name, value in inspect.signature(AutoencoderKL.__init__).parameters.items()}
    del ours["self"]

    assert VAEConfig(**ours) == VAEConfig()
    assert list(ours) == list(VAEConfig().to_dict())
    assert list(ours) == list(inspect.signature(DiffusersAutoencoderKL.__init__).parameters)[1:]


def test_wrong_arguments_are_named_before_anything_is_built() -> None:
    with pytest.raises(
        UserError, match=r"^AutoencoderKL: .*block_out_channels holds 10, which norm_num_groups 32 does"
    ):
        AutoencoderKL(block_out_channels=(10,))


def test_encode_returns_a_posterior_of_latents(tiny_vae, x) -> None:
    result = tiny_vae.encode(x)

    assert isinstance(result, AutoencoderKLOutput)
    assert isinstance(result.latent_dist, DiagonalGaussian)
    assert result.latent_dist.mean.shape == (3, 4, 8, 12)


def test_decode_returns_pictures(tiny_vae, z) -> None:
    result = tiny_vae.decode(z)

    assert isinstance(result, DecoderOutput)
    assert result.sample.shape == (3, 3, 16, 24)


def test_return_dict_false_gives_the_same_in_a_tuple(tiny_vae, x, z) -> None:
    (posterior,) = tiny_vae.encode(x, return_dict=False)
    (recon,) = tiny_vae.decode(z, return_dict=False)

    assert torch.equal(posterior.parameters, tiny_vae.encode(x).latent_dist.parameters)
    assert torch.equal(recon, tiny_vae.decode(z).sample)


def test_decode_takes_a_generator_and_draws_nothing(tiny_vae, z) -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()

    recon = tiny_vae.decode(z, return_dict=False, generator=generator)[0]

    assert torch.equal(recon, tiny_vae.decode(z).sample)
    assert torch.equal(generator.get_state(), state)


def test_forward_takes_the_mode_unless_asked_to_sample(tiny_vae, x) -> None:
    posterior = tiny_vae.encode(x).latent_dist

    assert torch.equal(tiny_vae(x).sample, tiny_vae.decode(posterior.mode()).sample)
    drawn = tiny_vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(5)).sample
    z = posterior.sample(torch.Generator().manual_seed(5))
    assert torch.equal(drawn, tiny_vae.decode(z).sample)


def test_slicing_equals_the_whole_batch(tiny_vae, x, z) -> None:
    moments, recon = tiny_vae.encode(x).latent_dist.parameters, tiny_vae.decode(z).sample

    tiny_vae.enable_slicing()

    # one convolution call an image instead of a batch; worst seen 3e-6 of 2.3, 20 seeds
    torch.testing.assert_close(tiny_vae.encode(x).latent_dist.parameters, moments, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiny_vae.decode(z).sample, recon, rtol=0, atol=1e-5)
    tiny_vae.disable_slicing()
    assert torch.equal(tiny_vae.decode(z).sample, recon)


def test_slicing_runs_one_image_at_a_time(tiny_vae, x) -> None:
    batch_sizes: list[int] = []
    tiny_vae.encoder.register_forward_hook(lambda module, args, moments: batch_sizes.append(len(moments)))

    tiny_vae.enable_slicing()
    tiny_vae.encode(x)

    assert batch_sizes == [1, 1, 1]


@torch.no_grad()
def test_tiling_equals_the_untiled_result(tiny_vae, assert_close) -> None:
    x, z = torch.rand(2, 3, 50, 78) * 2 - 1, torch.randn(2, 4, 25, 39)
    with ops.reference():
        moments, recon = tiny_vae.encode(x).latent_dist.parameters, tiny_vae.decode(z).sample

    tiny_vae.enable_tiling()

    # worst seen 2.7e-6, 20 seeds
    assert_close(tiny_vae.encode(x).latent_dist.parameters, moments)
    assert_close(tiny_vae.decode(z).sample, recon)


@torch.no_grad()
def test_tiling_holds_encode_and_decode_to_a_budget(tiny_vae, x, z) -> None:
    tiny_vae.enable_tiling(max_memory_gib=1e-6)

    with pytest.raises(
        UserError, match=r"max_memory_gib is 1e-06, and to encode 3 times 16x24 pixels takes at least 0\.\d+ GiB"
    ):
        tiny_vae.encode(x)
    with pytest.raises(
        UserError, match=r"max_memory_gib is 1e-06, and to decode 3 times 16x24 pixels takes at least 0\.\d+ GiB"
    ):
        tiny_vae.decode(z)


@torch.no_grad()
def test_disable_tiling_lifts_the_budget(tiny_vae, x) -> None:
    expected = tiny_vae(x).sample
    tiny_vae.enable_tiling(max_memory_gib=1e-6)

    tiny_vae.disable_tiling()

    assert torch.equal(tiny_vae(x).sample, expected)
    assert not tiny_vae.use_tiling
    assert tiny_vae.max_memory_gib is None


def test_tiling_says_that_gradients_keep_it_from_running(tiny_vae, x) -> None:
    expected = tiny_vae.encode(x).latent_dist.parameters

    tiny_vae.enable_tiling()

    with pytest.warns(
        UserWarning, match=r"^encode runs untiled although tiling is on: gradients are recorded; call it"
    ):
        moments = tiny_vae.encode(x).latent_dist.parameters
    assert torch.equal(moments, expected)


def test_sample_size_may_be_a_pair() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_preset("mini", sample_size=(64, 96))

    assert tuple(vae.config.sample_size) == (64, 96)


def test_encode_rejects_a_size_that_the_factor_does_not_divide(tiny_vae) -> None:
    with pytest.raises(UserError, match=r"image size 15x24 is not a multiple of 2 in both directions; pad it with"):
        tiny_vae.encode(torch.zeros(1, 3, 15, 24))


def test_encode_rejects_a_wrong_channel_count(tiny_vae) -> None:
    with pytest.raises(UserError, match=r"x has 1 channels, this VAE takes 3"):
        tiny_vae.encode(torch.zeros(1, 1, 16, 24))


def test_decode_rejects_a_wrong_channel_count(tiny_vae) -> None:
    with pytest.raises(UserError, match=r"z has 16 channels, this VAE takes 4"):
        tiny_vae.decode(torch.zeros(1, 16, 8, 8))


def test_forward_rejects_what_encode_rejects(tiny_vae) -> None:
    with pytest.raises(UserError, match=r"x has shape \(3, 16, 24\), it must be \(batch, 3, height, width\)"):
        tiny_vae(torch.zeros(3, 16, 24))


def test_encode_rejects_nan_pixels(tiny_vae, x) -> None:
    x[0, 0, 0, :2] = float("nan")

    with pytest.raises(
        UserError, match=r"encode was given 2 values that are not finite, of 3456; clean its input first"
    ):
        tiny_vae.encode(x)


def test_decode_rejects_damaged_weights(tiny_vae, z) -> None:
    tiny_vae.decoder.conv_out.bias.data[0] = float("nan")

    with pytest.raises(
        UserError, match=r"decode gave values that are not finite in float32 from .* weights are damaged"
    ):
        tiny_vae.decode(z)


def test_errors_are_value_errors(tiny_vae) -> None:
    with pytest.raises(ValueError, match="image size"):
        tiny_vae.encode(torch.zeros(1, 3, 15, 15))


@pytest.mark.parametrize("preset", PRESETS)
def test_from_preset_builds_the_preset(preset) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_preset(preset)

    assert VAEConfig.from_dict(dict(vae.config)) == PRESETS[preset]
    assert vae.factor == PRESETS[preset].factor == 8


def test_from_preset_takes_overrides() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_preset("sd1", block_out_channels=(32, 64, 64, 64), latent_channels=8)

    assert vae.encoder.conv_out.out_channels == 16


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sd2", {}, r"unknown preset 'sd2'; choose one of: sd1, sdxl, sd3, flux, mini\."),
        ("sd1", {"latent_chanels": 8}, r"^preset sd1: unknown key 'latent_chanels', did you mean 'latent_channels'\?"),
        (
            "sd1",
            {"block_out_channels": (32,)},
            r"^preset sd1: .*down_block_types has 4 entries and block_out_channels 1",
        ),
    ],
)
def test_from_preset_rejects(name, overrides, message) -> None:
    with pytest.raises(UserError, match=message):
        AutoencoderKL.from_preset(name, **overrides)


def test_presets_without_quant_convolutions_run() -> None:
    vae = AutoencoderKL.from_preset("flux", block_out_channels=(8, 8), norm_num_groups=4, **two_levels()).eval()

    assert vae.quant_conv is None
    assert vae.post_quant_conv is None
    assert vae(torch.rand(1, 3, 8, 8)).sample.shape == (1, 3, 8, 8)


def two_levels() -> dict[str, tuple[str, ...]]:
    return {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def test_batch_is_not_mixed(tiny_vae, x) -> None:
    recon = tiny_vae(x).sample

    # convolutions may pick another algorithm for another batch size; worst seen 5e-6 of 2.3, 20 seeds
    torch.testing.assert_close(tiny_vae(x.flip(0)).sample.flip(0), recon, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiny_vae(x[1:2]).sample, recon[1:2], rtol=0, atol=1e-5)


def test_every_parameter_is_trained(tiny_vae, x) -> None:
    tiny_vae.train()

    tiny_vae(x, sample_posterior=True).sample.square().mean().backward()

    assert all(weight.grad is not None for weight in tiny_vae.parameters())


def test_package_names_what_it_does_not_have() -> None:
    with pytest.raises(AttributeError, match="module 'sd_vae' has no attribute 'autoencoder_kl'"):
        sd_vae.autoencoder_kl  # noqa: B018


def test_package_lists_its_public_names() -> None:
    assert {"AutoencoderKL", "load_vae", "to_tensor"} <= set(dir(sd_vae))
    assert sd_vae.AutoencoderKL is AutoencoderKL
