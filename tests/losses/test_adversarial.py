"""The discriminator and the adversarial terms, against the formulas that taming-transformers published."""

import math

import pytest
import torch
from safetensors.torch import save_file

from sd_vae.errors import UserError
from sd_vae.losses.adversarial import (
    LeCam,
    PatchDiscriminator,
    adaptive_weight,
    adversarial_weight_at,
    build_discriminator,
    discriminator_loss,
    generator_loss,
)
from sd_vae.losses.config import AdversarialConfig

NORMS = ["group", "spectral", "batch"]


def discriminator(norm="group", width=8, num_layers=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PatchDiscriminator(norm, width, num_layers)


def images(batch_size=2, size=32, seed=0):
    return torch.rand(batch_size, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("norm", NORMS)
def test_discriminator_with_three_layers_gives_the_published_map(norm):
    logits = PatchDiscriminator(norm)(images(1, 256))

    assert logits.shape == (1, 1, 30, 30)


def test_discriminator_with_batch_norm_has_the_published_tensors():
    # taming-transformers: 6,4,4,4,4 convolutions numbered 0, 2, 5, 8, 11; no bias before a BatchNorm
    tensors = PatchDiscriminator("batch").state_dict()

    convolutions = {name: tuple(t.shape) for name, t in tensors.items() if t.dim() == 4}
    assert convolutions == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
    }
    assert {"main.0.bias", "main.11.bias", "main.3.running_mean"} <= tensors.keys()
    assert "main.2.bias" not in tensors


@pytest.mark.parametrize("norm", NORMS)
def test_discriminator_judges_each_picture_by_itself(norm):
    x, model = images(4), discriminator(norm).train()

    together, apart = model(x), torch.cat([model(part) for part in x.split(1)])

    # worst seen 3e-8 (convolutions of another batch size); statistics of the batch move it by 1e-2
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)


def test_discriminator_stays_in_eval_mode():
    model = discriminator("batch").train()

    assert not any(module.training for module in model.modules())


def test_discriminator_sees_its_smallest_picture_and_refuses_a_smaller():
    model = discriminator(num_layers=3)

    assert model(images(1, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"at least 24x24 pixels, these are 23x23; train on larger crops or lower"):
        model(images(1, 23))


def test_spectral_norms_move_only_when_advanced():
    model = discriminator("spectral")
    layer = model.main[0]
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(torch.rand(8, 3, 4, 4))
    before = [model(images()), model(images())]

    model.advance_()

    assert torch.equal(*before)
    assert not torch.equal(model(images()), before[0])
    assert not any(module.training for module in model.modules())


def test_spectral_norm_converges_to_the_largest_singular_value():
    model = discriminator("spectral")

    for _ in range(300):
        model.advance_()

    for layer in (layer for layer in model.main if isinstance(layer, torch.nn.Conv2d)):
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1.0, abs=1e-2)


def test_hinge_loss_is_the_published_formula():
    real, fake = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    expected = (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2

    torch.testing.assert_close(discriminator_loss(real, fake, "hinge"), expected)


def test_vanilla_loss_is_the_cross_entropy_of_both_sides():
    real, fake = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)))

    torch.testing.assert_close(discriminator_loss(real, fake, "vanilla"), expected)


def test_vanilla_loss_stays_finite_for_huge_logits():
    loss = discriminator_loss(torch.tensor([-1e4]), torch.tensor([1e4]), "vanilla")

    assert loss == 1e4


def test_generator_loss_is_minus_the_mean_logit():
    assert generator_loss(torch.tensor([1.0, 3.0])) == -2.0


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_adaptive_weight_is_latent_diffusions_over_the_image_elements(scale):
    # Published, for sums over an image: clamp(|sum gradient| / (|gan gradient| + 1e-4), 0, 1e4).
    num_elements = 3 * 64 * 64
    summed, adversarial = torch.randn(3, 8, 3, 3) * scale, torch.randn(3, 8, 3, 3)
    published = torch.clamp(summed.norm() / (adversarial.norm() + 1e-4), 0.0, 1e4)

    weight = adaptive_weight(summed / num_elements, adversarial, num_elements, 1e4)

    torch.testing.assert_close(weight * num_elements, published)


def test_adaptive_weight_of_a_vanishing_gradient_is_bounded():
    weight = adaptive_weight(torch.ones(4), torch.zeros(4), 100, 1e4)

    assert weight == 100.0


def test_adversarial_weight_is_off_before_its_start_and_rises_over_its_warm_up():
    config = AdversarialConfig(weight=0.5, start_step=10, warmup_steps=3)

    weights = [adversarial_weight_at(config, step) for step in (0, 9, 10, 11, 12, 13, 100)]

    assert weights == [0.0, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5]


def test_adversarial_weight_of_zero_stays_zero():
    assert adversarial_weight_at(AdversarialConfig(), 5) == 0.0


def test_lecam_pulls_logits_to_the_running_means_of_the_other_side():
    lecam = LeCam(0.9)
    lecam.advance_(torch.tensor(2.0), torch.tensor(-1.0))
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([0.0])

    penalty = lecam(real, fake)

    # running means 0.2 and -0.1: mean((1.1)^2, (3.1)^2) + (-0.2)^2
    assert float(penalty) == pytest.approx((1.1**2 + 3.1**2) / 2 + 0.2**2)


def test_build_discriminator_reads_the_weights_of_a_latent_diffusion_checkpoint(tmp_path):
    theirs = discriminator("batch")
    theirs.main[3].running_mean.fill_(0.25)
    tensors = {f"loss.discriminator.{name}": tensor for name, tensor in theirs.state_dict().items()}
    save_file(tensors | {"decoder.conv_in.bias": torch.zeros(1)}, tmp_path / "kl.safetensors")
    config = AdversarialConfig(norm="batch", width=8, num_layers=2, pretrained=str(tmp_path / "kl.safetensors"))

    ours = build_discriminator(config)

    assert torch.equal(ours(images()), theirs(images()))


def test_build_discriminator_refuses_weights_of_another(tmp_path):
    tensors = {f"loss.discriminator.{name}": tensor for name, tensor in discriminator("batch").state_dict().items()}
    save_file(tensors, tmp_path / "kl.safetensors")
    settings = {"norm": "batch", "pretrained": str(tmp_path / "kl.safetensors")}

    with pytest.raises(UserError, match=r"does not hold this discriminator \(\d+ problems, the first: main.0.bias is"):
        build_discriminator(AdversarialConfig(width=16, num_layers=2, **settings))
    with pytest.raises(UserError, match=r"the first: main.9.weight is missing"):
        build_discriminator(AdversarialConfig(width=8, num_layers=3, **settings))


def test_discriminator_learns_to_tell_noise_from_grey():
    model = discriminator()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    real, fake = images(), torch.zeros(2, 3, 32, 32)

    for _ in range(20):
        optimizer.zero_grad()
        discriminator_loss(model(real), model(fake), "hinge").backward()
        optimizer.step()

    assert (model(real) > 0).all()
    assert (model(fake) < 0).all()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"weight": -1.0}, r"adversarial.weight is -1.0, it must be a finite number >= 0"),
        ({"max_adaptive": math.inf}, r"adversarial.max_adaptive is inf"),
        ({"start_step": -1, "width": 0}, r"adversarial.start_step is -1, .* at least 0; adversarial.width is 0, .* 1"),
        ({"lecam_decay": 1.0}, r"adversarial.lecam_decay is 1.0, it must be in \[0, 1\)"),
        ({"norm": "batch"}, r"adversarial.norm is batch, whose statistics come from pretrained weights alone"),
    ],
)
def test_adversarial_config_rejects(fields, match):
    with pytest.raises(UserError, match=match):
        AdversarialConfig(**fields)
