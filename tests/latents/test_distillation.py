"""A small autoencoder learns from a tiny VAE: architecture, losses, names for ComfyUI."""

import pytest
import torch
from diffusers import AutoencoderTiny

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError
from sd_vae.latents.distillation import DistillConfig, build_student, comfyui_tensors, distill, losses, scaled


@pytest.fixture
def batches() -> list[torch.Tensor]:
    """Smooth pictures of 16x16 pixels."""
    coarse = torch.rand(12, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return [torch.nn.functional.interpolate(one, scale_factor=4, mode="bilinear") for one in coarse]


@pytest.fixture
def factor_8() -> AutoencoderKL:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, scaling_factor=0.5, shift_factor=0.25, **kinds)


def test_student_of_factor_8_is_taesd(factor_8) -> None:
    student = build_student(factor_8)

    assert sum(parameter.numel() for parameter in student.parameters()) == 2_445_063
    assert {name: value.shape for name, value in student.state_dict().items()} == {
        name: value.shape for name, value in AutoencoderTiny().state_dict().items()
    }


def test_student_fits_the_factor_of_the_vae(tiny_vae) -> None:
    student = build_student(tiny_vae)

    latents = student.encode(torch.zeros(1, 3, 8, 12)).latents

    assert latents.shape == (1, 4, 4, 6)
    assert student.decode(latents).sample.shape == (1, 3, 8, 12)


def test_scaled_is_what_a_diffusion_model_sees(tiny_vae) -> None:
    tiny_vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0, 4.0, 2.0, 4.0], scaling_factor=1.0)

    latents = scaled(tiny_vae, torch.full((1, 4, 1, 1), 5.0))

    assert latents.flatten().tolist() == [2.0, 1.0, 2.0, 1.0]


def test_distill_brings_the_student_nearer(tiny_vae, batches) -> None:
    student = build_student(tiny_vae)
    steps = []

    same = distill(tiny_vae, batches, DistillConfig(steps=12), student=student, progress=steps.append)

    assert same is student
    assert not student.training
    assert [step.number for step in steps] == list(range(1, 13))
    assert steps[-1].losses["decoder"] < 0.5 * steps[0].losses["decoder"]  # measured 0.38
    assert steps[-1].losses["encoder"] < steps[0].losses["encoder"]


def test_distill_leaves_the_teacher_alone(tiny_vae, batches) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_vae.state_dict().items()}

    distill(tiny_vae, batches, DistillConfig(steps=2))

    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_vae.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_vae.parameters())


def test_perceptual_distance_compares_with_the_teachers_picture(tiny_vae, batches) -> None:
    seen = []

    def distance(recon: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return (recon - x).square().mean(dim=(1, 2, 3))

    found = losses(tiny_vae, build_student(tiny_vae), batches[0], torch.Generator().manual_seed(0), distance)

    with torch.no_grad():
        z = tiny_vae.encode(batches[0]).latent_dist.sample(torch.Generator().manual_seed(0))
        torch.testing.assert_close(seen[0], tiny_vae.decode(z).sample.clamp(-1, 1), rtol=0, atol=0)
    assert set(found) == {"encoder", "decoder", "perceptual"}


def test_comfyui_tensors_count_the_clamp_and_carry_the_scale(factor_8) -> None:
    student = build_student(factor_8)

    tensors = comfyui_tensors(student, factor_8)

    assert torch.equal(tensors["taesd_decoder.1.weight"], student.decoder.layers[0].weight)
    assert torch.equal(tensors["taesd_encoder.0.weight"], student.encoder.layers[0].weight)
    assert torch.equal(tensors["taesd_decoder.3.conv.0.weight"], student.decoder.layers[2].conv[0].weight)
    assert (float(tensors["vae_scale"]), float(tensors["vae_shift"])) == (0.5, 0.25)
    assert len(tensors) == len(student.state_dict()) + 2


def test_comfyui_tensors_refuse_what_it_cannot_say(tiny_vae, factor_8) -> None:
    with pytest.raises(UserError, match="has factor 8, this VAE has 2; use the folder in diffusers"):
        comfyui_tensors(build_student(tiny_vae), tiny_vae)
    factor_8.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0, 2.0, 3.0, 4.0])
    with pytest.raises(UserError, match="has one scale for all channels, this VAE has one for each"):
        comfyui_tensors(build_student(factor_8), factor_8)


def test_distill_refuses_a_student_of_other_latents(tiny_vae, batches) -> None:
    with pytest.raises(UserError, match="the student has 4 latent channels and factor 8, the VAE 4 and 2"):
        distill(tiny_vae, batches, student=AutoencoderTiny())


def test_distill_says_when_pictures_end(tiny_vae, batches) -> None:
    with pytest.raises(UserError, match="the pictures ended after 2 batches of 3"):
        distill(tiny_vae, batches[:2], DistillConfig(steps=3))


def test_distill_stops_at_a_loss_that_is_not_finite(tiny_vae, batches) -> None:
    with pytest.raises(UserError, match=r"the loss is (inf|nan) at step \d"):
        distill(tiny_vae, batches, DistillConfig(steps=9, lr=1e30))


def test_build_student_refuses_factor_1() -> None:
    with pytest.raises(UserError, match="the VAE has factor 1"):
        build_student(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"perceptual_weight": 0.0}, "perceptual_weight is 0"),
    ],
)
def test_config_refuses(values, words) -> None:
    with pytest.raises(UserError, match=words):
        DistillConfig(**values)
