import copy

import pytest
import torch

from sd_vae.losses.config import KLConfig, LossConfig, PerceptualConfig
from sd_vae.losses.objective import Objective
from sd_vae.losses.perceptual import LPIPS
from sd_vae.posterior import DiagonalGaussian


def config(net="ms_dssim", weight=1.0, kl_weight=1e-2, **fields):
    perceptual = PerceptualConfig(net=net, weight=weight, **fields)
    return LossConfig(perceptual=perceptual, kl=KLConfig(weight=kl_weight))


def images(size=64, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(batch_size, 3, size // 8, size // 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(small, size=(size, size), mode="bicubic").clamp(-1, 1)


def forward(vae, x):
    """What a training step computes: reconstruction and posterior, noise fixed by the batch's shape."""
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    return vae.decode(posterior.sample(noise=noise)).sample, posterior


def gradients(objective, vae, x):
    vae = copy.deepcopy(vae)
    result = objective(x, *forward(vae, x))
    result.total.backward()
    return result, {name: parameter.grad for name, parameter in vae.named_parameters()}


def test_objective_total_is_the_weighted_sum_of_its_terms(tiny_vae):
    x = images()

    total, terms, _ = Objective(config(weight=0.3))(x, *forward(tiny_vae, x))

    assert list(terms) == ["reconstruction", "ms_dssim", "kl"]
    expected = terms["reconstruction"] + 0.3 * terms["ms_dssim"] + 1e-2 * terms["kl"]
    torch.testing.assert_close(total, expected)


def test_objective_terms_carry_no_gradient(tiny_vae):
    x = images()

    total, terms, _ = Objective(config())(x, *forward(tiny_vae, x))

    assert total.requires_grad
    assert not any(term.requires_grad for term in terms.values())


def test_objective_names_the_perceptual_term_after_its_network(tiny_vae, standin):
    x = images()

    terms = Objective(config("alex", backbone=str(standin("alex"))))(x, *forward(tiny_vae, x)).terms

    assert list(terms) == ["reconstruction", "lpips_alex", "kl"]


def test_objective_perceptual_weight_zero_is_bit_for_bit_without(tiny_vae):
    x = images()
    recon, posterior = forward(tiny_vae, x)
    without = torch.nn.functional.mse_loss(recon, x) + 1e-2 * posterior.kl_map().mean()
    expected = torch.autograd.grad(without, list(tiny_vae.parameters()))

    result, actual = gradients(Objective(config(weight=0.0)), tiny_vae, x)

    assert list(result.terms) == ["reconstruction", "kl"]
    assert torch.equal(result.total, without)
    assert all(torch.equal(a, b) for a, b in zip(actual.values(), expected, strict=True))


def test_objective_kl_weight_zero_only_logs_the_term(tiny_vae):
    x = images()
    recon, _ = forward(tiny_vae, x)
    expected = torch.autograd.grad(torch.nn.functional.mse_loss(recon, x), list(tiny_vae.parameters()))

    result, actual = gradients(Objective(config(weight=0.0, kl_weight=0.0)), tiny_vae, x)

    assert result.terms["kl"] > 0
    assert all(torch.equal(a, b) for a, b in zip(actual.values(), expected, strict=True))


def test_objective_kl_weight_zero_adds_nothing_even_of_an_infinite_term():
    x = images()
    posterior = DiagonalGaussian(torch.full((2, 8, 4, 4), 1e30))

    total, terms, _ = Objective(config(weight=0.0, kl_weight=0.0))(x, x, posterior)

    assert terms["kl"].isinf()
    assert total == 0


def test_objective_perceptual_weight_changes_the_decoders_gradient(tiny_vae):
    # diffusers' training script computes LPIPS under no_grad: its weight changes only the logged number.
    x = images()

    weak, strong = (gradients(Objective(config(weight=w)), tiny_vae, x)[1]["decoder.conv_out.weight"] for w in (0.1, 1))

    assert (weak - strong).abs().max() > 1e-2 * strong.abs().max()


@pytest.mark.parametrize("convention", ["mean", "ldm"])
def test_objective_is_unchanged_by_repeating_the_batch(tiny_vae, convention):
    x = images()
    objective = Objective(LossConfig(perceptual=PerceptualConfig(net="ms_dssim"), kl=KLConfig(convention=convention)))

    once = objective(x, *forward(tiny_vae, x)).terms
    recon, posterior = forward(tiny_vae, x)
    twice = objective(x.repeat(2, 1, 1, 1), recon.repeat(2, 1, 1, 1), double(posterior)).terms

    for name, term in once.items():
        torch.testing.assert_close(twice[name], term, rtol=1e-6, atol=1e-7)


def double(posterior):
    return DiagonalGaussian(posterior.parameters.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("convention", ["mean", "ldm"])
def test_objective_pixel_and_kl_terms_are_unchanged_by_tiling(tiny_vae, convention):
    x = images()
    recon, posterior = forward(tiny_vae, x)
    settings = LossConfig(perceptual=PerceptualConfig(weight=0.0), kl=KLConfig(convention=convention))

    whole = Objective(settings)(x, recon, posterior).terms
    tiles = DiagonalGaussian(posterior.parameters.tile(1, 1, 2, 2))
    tiled = Objective(settings)(x.tile(1, 1, 2, 2), recon.tile(1, 1, 2, 2), tiles).terms

    # worst seen 1e-7
    torch.testing.assert_close(tiled["reconstruction"], whole["reconstruction"], rtol=1e-6, atol=0)
    torch.testing.assert_close(tiled["kl"], whole["kl"], rtol=1e-6, atol=0)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("net", "file"),
    [("alex", "alexnet_features_torchvision.pth"), ("squeeze", "squeezenet1_1_features_torchvision.pth")],
)
def test_lpips_moves_by_less_than_a_tenth_under_tiling(net, file, shared, photo_pair):
    x, recon = photo_pair
    model = LPIPS(net, str(shared / "weights" / file))

    whole, tiled = model(recon, x), model(recon.tile(1, 1, 2, 2), x.tile(1, 1, 2, 2))

    assert ((tiled / whole - 1).abs() < 0.1).all()


@pytest.mark.shared
def test_objective_gradients_through_a_vae_equal_the_lpips_package(tiny_vae, shared, photo_pair):
    import warnings

    import lpips

    x, _ = photo_pair
    path = shared / "weights" / "alexnet_features_torchvision.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    features = torch.load(path, weights_only=True)
    package.net.load_state_dict({key: features["features." + key.split(".", 1)[1]] for key in package.net.state_dict()})
    recon, posterior = forward(tiny_vae, x)
    total = torch.nn.functional.mse_loss(recon, x) + package(recon, x).mean() + 1e-2 * posterior.kl_map().mean()
    names = ["encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight", "quant_conv.bias"]
    expected = dict(zip(names, torch.autograd.grad(total, [tiny_vae.get_parameter(n) for n in names]), strict=True))

    result, actual = gradients(Objective(config("alex", backbone=str(path))), tiny_vae, x)

    torch.testing.assert_close(result.total, total, rtol=1e-5, atol=0)
    for name in names:
        ours, theirs = actual[name], expected[name]
        if name.startswith("quant_conv"):
            ours, theirs = (gradient.chunk(2)[1] for gradient in (ours, theirs))  # the rows of logvar
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_objective_trains_an_untrained_vae_with_ms_dssim(tiny_vae):
    x = images()

    _, actual = gradients(Objective(config(weight=1.0, kl_weight=0.0)), tiny_vae, x)
    _, without = gradients(Objective(config(weight=0.0, kl_weight=0.0)), tiny_vae, x)

    assert all(gradient.isfinite().all() for gradient in actual.values())
    assert not torch.equal(actual["decoder.conv_out.weight"], without["decoder.conv_out.weight"])


def test_objective_fidelity_is_the_total_without_kl(tiny_vae):
    x = images()

    total, terms, fidelity = Objective(config(weight=0.3))(x, *forward(tiny_vae, x))

    torch.testing.assert_close(fidelity, terms["reconstruction"] + 0.3 * terms["ms_dssim"])
    torch.testing.assert_close(total, fidelity + 1e-2 * terms["kl"])


def test_objective_warms_the_kl_weight_up(tiny_vae):
    x = images()
    objective = Objective(LossConfig(perceptual=PerceptualConfig(weight=0.0), kl=KLConfig(weight=0.5, warmup_steps=10)))

    results = {step: objective(x, *forward(tiny_vae, x), step) for step in (0, 5, 10, None)}

    shares = [float((r.total - r.fidelity).detach() / (0.5 * r.terms["kl"])) for r in results.values()]
    assert shares == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_objective_with_a_learned_logvar_is_latent_diffusions_likelihood(tiny_vae):
    # Published: sum(|x - recon| + w * LPIPS) / exp(logvar) + logvar over all 3HW values of an image, mean over images.
    x = images()
    settings = LossConfig(
        reconstruction="l1", learn_logvar=True, perceptual=PerceptualConfig(weight=0.0), kl=KLConfig(weight=0.0)
    )
    objective = Objective(settings)
    objective.output.logvar.data.fill_(-1.5)
    recon, posterior = forward(tiny_vae, x)
    published = ((x - recon).abs() / torch.exp(torch.tensor(-1.5)) - 1.5).sum() / len(x)

    result = objective(x, recon, posterior)

    torch.testing.assert_close(result.total, published / x[0].numel())
    assert result.terms["logvar"] == -1.5


def test_objective_logvar_settles_at_the_log_of_the_mean_distance(tiny_vae):
    x = images()
    settings = LossConfig(learn_logvar=True, perceptual=PerceptualConfig(weight=0.0), kl=KLConfig(weight=0.0))
    objective, (recon, posterior) = Objective(settings), forward(tiny_vae, x)
    objective.output.logvar.data.fill_(float(torch.nn.functional.mse_loss(recon.detach(), x).log()))

    (gradient,) = torch.autograd.grad(objective(x, recon, posterior).total, [objective.output.logvar])

    assert abs(float(gradient)) < 1e-6


def test_objective_in_float64_stays_in_float64(tiny_vae):
    x = images().double()
    vae = tiny_vae.double()
    posterior = vae.encode(x).latent_dist
    recon = vae.decode(posterior.mode()).sample

    total = Objective(config(weight=0.0))(x, recon, posterior).total

    assert total.dtype == torch.float64
