"""Rescaled weights give the same outcome, finite in float16 where the original overflows, or are refused."""

import math

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL

from sd_vae import AutoencoderKL, UserError, VAEConfig
from sd_vae.half_precision import probe, rescale_for_float16
from sd_vae.half_precision.ranges import FLOAT16_MAX
from sd_vae.half_precision.rescale import MARGIN
from sd_vae.half_precision.streams import layer_scales, norm_scales, trace


def multiply(vae: AutoencoderKL, factor: float, *layers: str) -> None:
    for name in layers:
        for weight in vae.get_submodule(name).parameters():
            weight.data.mul_(factor)


def everywhere() -> AutoencoderKL:
    """Attention, shortcuts and resampling on every level, biases and norms that are not trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
            layers_per_block=2,
            norm_num_groups=4,
        )
        for parameter in vae.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.3)
        return vae.eval()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_any_scales_leave_the_outcome_where_eps_is_scaled_along(x, seed) -> None:
    vae = everywhere().double()
    x = x.double()
    generator = torch.Generator().manual_seed(seed)
    expected = vae(x).sample
    network = trace(VAEConfig.from_dict(dict(vae.config)))
    scales = {name: float(2.0 ** torch.randint(-6, 7, (), generator=generator)) for name in network.streams}

    for name, weight_scale, bias_scale in layer_scales(network, scales):
        vae.get_submodule(name).weight.mul_(weight_scale)
        vae.get_submodule(name).bias.mul_(bias_scale)
    for name, scale in norm_scales(network, scales):
        vae.get_submodule(name).eps *= scale**2

    # bit-equal for 20 seeds on this machine; another order of sums would move 1e-15
    torch.testing.assert_close(vae(x).sample, expected, rtol=0, atol=1e-12)


def test_streams_cover_every_layer_but_those_that_end_a_half(tiny_vae) -> None:
    network = trace(VAEConfig.from_dict(dict(tiny_vae.config)))

    norms = {name for name, module in tiny_vae.named_modules() if isinstance(module, torch.nn.GroupNorm)}
    layers = {name.rpartition(".")[0] for name, _ in tiny_vae.named_parameters()} - norms
    outside = {"quant_conv", "post_quant_conv", "encoder.conv_out", "decoder.conv_out"}
    assert sorted(layer.name for layer in network.layers) == sorted(layers - outside)
    assert sorted(norm for stream in network.streams.values() for norm in stream.norms) == sorted(norms)


@torch.no_grad()
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_rescaled_weights_are_finite_in_float16_where_the_original_overflows(make_loud, x, z, half) -> None:
    vae = make_loud(half)
    expected = (vae.encode(x).latent_dist.mean, vae.decode(z).sample)
    original = vae.to_diffusers()

    rescaled, _ = rescale_for_float16(vae, [x])

    results = []
    for model in (original.half(), rescaled.to_diffusers().half()):
        results.append((model.encode(x.half()).latent_dist.mean, model.decode(z.half()).sample))
    overflowed, mended = results
    assert not all(bool(result.isfinite().all()) for result in overflowed)
    for result, reference in zip(mended, expected, strict=True):
        # worst of 20 models 2.8e-3: float16 itself
        torch.testing.assert_close(result.float(), reference, rtol=0, atol=1e-2 * float(reference.abs().max()))


@torch.no_grad()
def test_rescaled_weights_give_the_same_outcome_in_float32(make_loud, x, z) -> None:
    vae = make_loud()
    make_loud("encoder")
    expected = (vae.encode(x).latent_dist.parameters, vae.decode(z).sample)

    rescaled, rescaling = rescale_for_float16(vae, [x])

    assert rescaling.before.overflowing
    for result, reference in zip(
        (rescaled.encode(x).latent_dist.parameters, rescaled.decode(z).sample), expected, strict=True
    ):
        # bit-equal for 20 models on this machine: eps is nothing beside variances of 1e8
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-6 * float(reference.abs().max()))


def test_rescaling_takes_the_largest_power_of_two_with_the_margin(make_loud, x) -> None:
    vae = make_loud()

    _, rescaling = rescale_for_float16(vae, [x])

    streams = trace(VAEConfig.from_dict(dict(vae.config))).streams
    assert rescaling.scales
    for name, scale in rescaling.scales.items():
        places = streams[name].places
        peak = max(rescaling.before[place].peak for place in places)
        assert math.log2(scale) == int(math.log2(scale))
        assert scale * MARGIN * peak <= FLOAT16_MAX < 2 * scale * MARGIN * peak
    assert not rescaling.after.overflowing


def test_rescaling_keeps_keys_and_config_but_force_upcast(make_loud, x) -> None:
    vae = make_loud()

    rescaled, _ = rescale_for_float16(vae, [x])

    assert list(rescaled.state_dict()) == list(vae.state_dict())
    ours, theirs = (VAEConfig.from_dict(model.config).to_dict() for model in (rescaled, vae))
    assert ours == theirs | {"force_upcast": False}


def test_rescaling_touches_only_what_overflows(make_loud, x) -> None:
    vae = make_loud("encoder")
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}

    rescaled, _ = rescale_for_float16(vae, [x])

    assert all(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())
    changed = {name for name, weight in rescaled.state_dict().items() if not torch.equal(weight, before[name])}
    assert "encoder.conv_in.weight" in changed
    assert not {name for name in changed if not name.startswith("encoder.")}


def test_rescaling_changes_no_weight_where_nothing_overflows(tiny_vae, x) -> None:
    rescaled, rescaling = rescale_for_float16(tiny_vae, [x])

    assert (rescaling.scales, rescaling.num_layers) == ({}, 0)
    assert (rescaling.predicted_change, rescaling.measured_change) == (0.0, 0.0)
    assert all(torch.equal(weight, rescaled.state_dict()[name]) for name, weight in tiny_vae.state_dict().items())


def test_rescaling_mends_a_branch_alone(tiny_vae, x) -> None:
    conv1 = "decoder.mid_block.resnets.0.conv1"
    multiply(tiny_vae, 2.0**18, conv1)

    rescaled, rescaling = rescale_for_float16(tiny_vae, [x])

    assert list(rescaling.scales) == [conv1]
    assert rescaling.num_layers == 1
    assert not probe(rescaled, [x]).overflowing


@pytest.mark.parametrize(("loud", "quiet", "is_q"), [("to_q", "to_k", True), ("to_k", "to_q", False)])
def test_rescaling_balances_q_against_k(tiny_vae, x, loud, quiet, is_q) -> None:
    attention = "decoder.mid_block.attentions.0"
    multiply(tiny_vae, 2.0**16, f"{attention}.{loud}")
    multiply(tiny_vae, 2.0**-16, f"{attention}.{quiet}")

    rescaled, rescaling = rescale_for_float16(tiny_vae, [x])

    (scale,) = rescaling.scales.values()
    assert list(rescaling.scales) == [f"{attention}.to_q"]
    assert (scale < 1) == is_q
    assert not probe(rescaled, [x]).overflowing
    assert rescaling.after[f"{attention}.logits"].peak == rescaling.before[f"{attention}.logits"].peak


def test_rescaling_balances_v_against_to_out(tiny_vae, x) -> None:
    attention = "decoder.mid_block.attentions.0"
    multiply(tiny_vae, 2.0**17, f"{attention}.to_v")
    tiny_vae.get_submodule(f"{attention}.to_out.0").weight.data.mul_(2.0**-17)

    rescaled, rescaling = rescale_for_float16(tiny_vae, [x])

    assert list(rescaling.scales) == [f"{attention}.to_v"]
    assert not probe(rescaled, [x]).overflowing


def make_uneven(vae: AutoencoderKL, quiet: float) -> None:
    """One branch with a group of magnitude 1e6 and another so quiet that eps / s^2 is seen beside it."""
    conv1 = vae.get_submodule("decoder.mid_block.resnets.0.conv1")
    multiply(vae, 2.0**20, "decoder.mid_block.resnets.0.conv1")
    conv1.weight.data[:4] *= quiet * 2.0**-20
    conv1.bias.data[:4] *= quiet * 2.0**-20


def test_rescaling_predicts_what_it_measures(tiny_vae, x) -> None:
    make_uneven(tiny_vae, 2.0**10)

    _, rescaling = rescale_for_float16(tiny_vae, [x])

    assert rescaling.measured_change > 1e-7
    assert rescaling.predicted_change == pytest.approx(rescaling.measured_change, rel=0.2)


def test_rescaling_refuses_a_change_above_the_bound(tiny_vae, x) -> None:
    make_uneven(tiny_vae, 1.0)

    with pytest.raises(
        UserError,
        match=r"would change the outcome by \d\.\de-0\d of its largest magnitude as predicted and \d\.\de-0\d as "
        r"measured, above 1e-04: at a scale of 2\^-\d+, GroupNorm's eps is not small beside the variance that "
        r"decoder\.mid_block\.resnets\.0\.norm2 sees, .*; run this VAE in bfloat16",
    ):
        rescale_for_float16(tiny_vae, [x])


def test_rescaling_names_a_groupnorm_that_overflows_itself(tiny_vae, x) -> None:
    multiply(tiny_vae, 2.0**16, "decoder.conv_norm_out")
    tiny_vae.decoder.conv_out.weight.data.mul_(2.0**-16)

    with pytest.raises(
        UserError,
        match=r"no rescaling mends, .*decoder\.conv_norm_out \(GroupNorm's own output, .*run this VAE in bfloat",
    ):
        rescale_for_float16(tiny_vae, [x])


def test_rescaling_refuses_q_and_k_that_both_overflow(tiny_vae, x) -> None:
    attention = "encoder.mid_block.attentions.0"
    multiply(tiny_vae, 2.0**16, f"{attention}.to_q", f"{attention}.to_k")

    with pytest.raises(
        UserError, match=r"cannot hold 3 results that no rescaling mends, .*encoder\.mid_block\.attentions"
    ):
        rescale_for_float16(tiny_vae, [x])


def test_rescaling_refuses_weights_beyond_float16(tiny_vae, x) -> None:
    tiny_vae.encoder.conv_out.weight.data[0, 0, 0, 0] = 1e5
    multiply(tiny_vae, 1e-5, "encoder.conv_norm_out")

    with pytest.raises(
        UserError, match=r"holds at most 65504, and 1 rescaled weight tensors .*: encoder\.conv_out\.weight"
    ):
        rescale_for_float16(tiny_vae, [x])


def test_rescaling_tells_three_runs_a_picture(tiny_vae, x) -> None:
    told = []

    rescale_for_float16(tiny_vae, [x, x], progress=lambda done, total: told.append((done, total)))

    assert told == [(done, 6) for done in range(1, 7)]


def test_rescaled_folder_opens_in_plain_diffusers(make_loud, x, tmp_path) -> None:
    rescaled, _ = rescale_for_float16(make_loud(), [x])

    rescaled.save_pretrained(tmp_path)

    opened = DiffusersAutoencoderKL.from_pretrained(tmp_path)
    assert opened.config.force_upcast is False
    assert all(torch.equal(weight, rescaled.state_dict()[name]) for name, weight in opened.state_dict().items())
