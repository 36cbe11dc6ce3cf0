import copy
import warnings

import lpips
import pytest
import torch
from safetensors.torch import load_file

from sd_vae.errors import UserError
from sd_vae.losses.config import PerceptualConfig
from sd_vae.losses.perceptual import LPIPS, MultiScaleDSSIM, build_perceptual

SHARED_FILES = {"alex": "alexnet_features_torchvision.pth", "squeeze": "squeezenet1_1_features_torchvision.pth"}


def random_pair(size=64, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size, 3, size, size, generator=generator) * 2 - 1
    return x, (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def package_lpips(net, features):
    """The `lpips` package's own model over given features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    model.net.load_state_dict({key: features["features." + key.split(".", 1)[1]] for key in model.net.state_dict()})
    return model


def assert_same_value_and_gradient(ours, theirs, recon, x):
    gradients, values = [], []
    for distance in (ours, theirs):
        leaf = recon.clone().requires_grad_()
        values.append(distance(leaf, x).flatten())
        gradients.append(torch.autograd.grad(values[-1].sum(), leaf)[0])

    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5 * gradients[1].abs().max().item())


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_lpips_equals_the_package_on_standins(net, standin):
    x, recon = random_pair()

    # worst seen: 0 for both, the same operations in the same order
    assert_same_value_and_gradient(LPIPS(net, str(standin(net))), package_lpips(net, load_file(standin(net))), recon, x)


@pytest.mark.shared
@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_equals_the_package_on_photos(net, shared, photo_pair):
    x, recon = photo_pair
    path = shared / "weights" / SHARED_FILES[net]
    features = torch.load(path, weights_only=True)

    assert_same_value_and_gradient(LPIPS(net, str(path)), package_lpips(net, features), recon, x)


def test_lpips_of_equal_images_is_zero(alex):
    x, _ = random_pair()

    assert alex(x, x).tolist() == [0.0, 0.0]


def test_lpips_of_flat_images_has_a_finite_gradient(alex):
    recon = torch.zeros(1, 3, 64, 64, requires_grad=True)

    alex(recon, -torch.ones(1, 3, 64, 64)).sum().backward()

    assert recon.grad.isfinite().all()


@pytest.mark.parametrize("net", ["alex", "ms_dssim"])
def test_perceptual_gradient_reaches_the_reconstruction_alone(net, standin):
    backbone = str(standin("alex")) if net == "alex" else None
    perceptual = build_perceptual(PerceptualConfig(net=net, backbone=backbone))
    x, recon = (image.requires_grad_() for image in random_pair())

    perceptual(recon, x).sum().backward()

    assert recon.grad.abs().max() > 0
    assert x.grad is None
    assert all(parameter.grad is None for parameter in perceptual.parameters())


def test_lpips_keeps_no_graph_of_the_target(alex):
    x, recon = random_pair()
    calls = []
    alex.model.net.register_forward_hook(lambda _, __, features: calls.append(features[0].requires_grad))

    alex(recon.requires_grad_(), x)

    assert calls == [False, True]


@pytest.mark.parametrize("net", ["alex", "ms_dssim"])
def test_perceptual_stays_in_eval_mode_and_frozen(net, standin):
    backbone = str(standin("alex")) if net == "alex" else None
    perceptual = build_perceptual(PerceptualConfig(net=net, backbone=backbone))

    torch.nn.ModuleList([perceptual]).train()

    assert not any(module.training for module in perceptual.modules())
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


@pytest.mark.parametrize("net", ["alex", "ms_dssim"])
def test_perceptual_is_fp32_under_autocast(net, standin):
    backbone = str(standin("alex")) if net == "alex" else None
    perceptual = build_perceptual(PerceptualConfig(net=net, backbone=backbone))
    x, recon = random_pair()
    expected = perceptual(recon.bfloat16().float(), x)

    with torch.autocast("cpu", torch.bfloat16):
        distance = perceptual(recon.bfloat16(), x)

    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, expected, rtol=0, atol=0)


def test_lpips_building_leaves_the_global_generator_alone(standin):
    state = torch.get_rng_state()

    LPIPS("squeeze", str(standin("squeeze")))

    assert torch.equal(torch.get_rng_state(), state)


def test_lpips_building_prints_nothing(standin, capfd):
    LPIPS("squeeze", str(standin("squeeze")))

    assert capfd.readouterr() == ("", "")


def test_lpips_copies_deeply(alex):
    x, recon = random_pair()

    assert torch.equal(copy.deepcopy(alex)(recon, x), alex(recon, x))


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_lpips_takes_its_smallest_size_and_names_it_below(net, standin):
    model = LPIPS(net, str(standin(net)))
    size = model.min_size

    distance = model(torch.zeros(1, 3, size, 64), torch.ones(1, 3, size, 64))

    assert distance.isfinite().all()
    with pytest.raises(
        UserError, match=rf"lpips_{net} needs images of at least {size}x{size} pixels, .* {size - 1}x64"
    ):
        model(torch.zeros(1, 3, size - 1, 64), torch.ones(1, 3, size - 1, 64))


def test_ms_dssim_takes_its_smallest_size_and_names_it_below():
    perceptual = MultiScaleDSSIM()

    distance = perceptual(torch.zeros(1, 3, 44, 44), torch.ones(1, 3, 44, 44))

    assert distance.isfinite().all()
    with pytest.raises(UserError, match=r"ms_dssim needs images of at least 44x44 pixels, these are 43x44"):
        perceptual(torch.zeros(1, 3, 43, 44), torch.ones(1, 3, 43, 44))


def test_ms_dssim_orders_images_by_damage():
    x, _ = random_pair()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    distances = [MultiScaleDSSIM()(x + strength * noise, x) for strength in (0.0, 0.05, 0.5)]

    assert distances[0].abs().max() < 1e-6
    assert (distances[0] < distances[1]).all()
    assert (distances[1] < distances[2]).all()
    assert distances[2].max() <= 1


def test_ms_dssim_is_per_image():
    x, recon = random_pair()

    both = MultiScaleDSSIM()(recon, x)

    torch.testing.assert_close(both, torch.cat([MultiScaleDSSIM()(recon[i : i + 1], x[i : i + 1]) for i in (0, 1)]))


@pytest.mark.parametrize("recon", ["equal", "opposite", "flat"])
def test_ms_dssim_gradient_is_finite_at_the_edges(recon):
    x, _ = random_pair()
    recon = {"equal": x, "opposite": -x, "flat": torch.zeros_like(x)}[recon].clone().requires_grad_()

    MultiScaleDSSIM()(recon, x).sum().backward()

    assert recon.grad.isfinite().all()


def test_ms_dssim_exponents_sum_to_one():
    # A flat grey against a flat white: only the luminance term of the coarsest scale is below 1.
    x, recon = torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    c1 = (0.01 * 2.0) ** 2
    luminance = c1 / (1.0 + c1)

    distance = MultiScaleDSSIM()(recon, x)

    exponent = 0.3001 / (0.0448 + 0.2856 + 0.3001)
    torch.testing.assert_close(distance, torch.tensor([1 - ((1 + luminance) / 2) ** exponent]), rtol=1e-4, atol=0)


def test_perceptual_rejects_other_channel_counts():
    with pytest.raises(UserError, match=r"ms_dssim compares RGB images, these have 1 channels; set its weight to 0"):
        MultiScaleDSSIM()(torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64))


def test_perceptual_rejects_different_shapes():
    with pytest.raises(UserError, match=r"recon has shape \(1, 3, 64, 64\) and x \(2, 3, 64, 64\)"):
        MultiScaleDSSIM()(torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64))


def test_build_perceptual_with_weight_zero_builds_nothing():
    assert build_perceptual(PerceptualConfig(weight=0.0, net="vgg", backbone="nowhere.pth")) is None
