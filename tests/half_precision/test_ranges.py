"""The probe sees every result that float16 would have to hold, at its true size, and leaves the model alone."""

import copy
import math

import pytest
import torch
from PIL import Image

from sd_vae import AutoencoderKL, UserError
from sd_vae.data import open_source
from sd_vae.half_precision import load_pictures, probe
from sd_vae.half_precision.ranges import FLOAT16_MAX


def test_probe_looks_at_every_layer_and_sum(tiny_vae, x) -> None:
    names = {layer.name for layer in probe(tiny_vae, [x]).layers}

    layers = {name.rpartition(".")[0] for name, _ in tiny_vae.named_parameters()}
    blocks = {
        name for name, module in tiny_vae.named_modules() if type(module).__name__ in ("ResnetBlock2D", "Attention")
    }
    activations = {f"{name}.nonlinearity" for name in blocks if "resnets" in name}
    logits = {f"{name}.logits" for name in blocks if "attentions" in name}
    assert names == layers | blocks | activations | logits | {"encoder.conv_act", "decoder.conv_act"}


@torch.no_grad()
def test_probe_reports_the_true_magnitude(tiny_vae, x) -> None:
    resnet = tiny_vae.encoder.down_blocks[0].resnets[0]
    h = tiny_vae.encoder.conv_in(x)
    expected = {
        "encoder.conv_in": h,
        "encoder.down_blocks.0.resnets.0.norm1": resnet.norm1(h),
        "encoder.down_blocks.0.resnets.0": resnet(h),
        "quant_conv": tiny_vae.encode(x).latent_dist.parameters,
        "decoder.conv_out": tiny_vae(x).sample,
    }

    report = probe(tiny_vae, [x])

    for name, result in expected.items():
        assert report[name].peak == pytest.approx(float(result.abs().max()), rel=1e-5)
        assert report[name].margin == pytest.approx(FLOAT16_MAX / float(result.abs().max()), rel=1e-5)


@torch.no_grad()
def test_probe_reports_the_largest_logit(tiny_vae, x) -> None:
    attention = tiny_vae.decoder.mid_block.attentions[0]
    z = tiny_vae.encode(x).latent_dist.mean
    given: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    tiny_vae.decode(z)
    handle.remove()
    h = attention.group_norm(given[0].flatten(2)).transpose(1, 2)
    logits = attention.to_q(h) @ attention.to_k(h).transpose(1, 2) / math.sqrt(16)

    report = probe(tiny_vae, [x])

    assert report["decoder.mid_block.attentions.0.logits"].peak == pytest.approx(float(logits.abs().max()), rel=1e-5)


@torch.no_grad()
def test_probe_reports_the_smallest_variance_of_a_group(tiny_vae, x) -> None:
    h = tiny_vae.encoder.conv_in(x).unflatten(1, (4, -1))
    expected = float(h.flatten(2).var(dim=-1, correction=0).min())

    report = probe(tiny_vae, [x])

    assert report["encoder.down_blocks.0.resnets.0.norm1"].variance == pytest.approx(expected, rel=1e-5)


def test_probe_takes_the_largest_over_all_pictures(tiny_vae, x) -> None:
    quiet, loud = 0.1 * x, x

    together = probe(tiny_vae, [loud, quiet])

    expected = max(probe(tiny_vae, [each])["encoder.conv_in"].peak for each in (loud, quiet))
    assert together["encoder.conv_in"].peak == expected
    assert together.num_pictures == 2


def test_probe_names_what_overflows_worst_first(make_loud, x) -> None:
    report = probe(make_loud(), [x])

    peaks = [layer.peak for layer in report.layers]
    assert peaks == sorted(peaks, reverse=True)
    assert "decoder.conv_in" in {layer.name for layer in report.overflowing}
    assert all(layer.name.startswith("decoder.") and layer.margin < 1 for layer in report.overflowing)


def test_probe_runs_half_precision_weights_in_float32(make_loud, x) -> None:
    vae = make_loud().bfloat16()

    report = probe(vae, [x])

    assert report.overflowing
    assert report.layers == probe(copy.deepcopy(vae).float(), [x]).layers
    assert vae.dtype == torch.bfloat16


def test_probe_leaves_the_model_as_it_was(tiny_vae, x) -> None:
    before = {name: weight.clone() for name, weight in tiny_vae.state_dict().items()}
    tiny_vae.train()

    probe(tiny_vae, [x])

    assert tiny_vae.training
    assert all(not module._forward_hooks for module in tiny_vae.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_vae.state_dict().items())


def test_probe_takes_a_plain_diffusers_vae(tiny_vae, x) -> None:
    assert probe(tiny_vae.to_diffusers(), [x]) == probe(tiny_vae, [x])


def test_probe_tells_its_progress(tiny_vae, x) -> None:
    told = []

    probe(tiny_vae, [x, x], progress=lambda done, total: told.append((done, total)))

    assert told == [(1, 2), (2, 2)]


def test_probe_refuses_no_pictures(tiny_vae) -> None:
    with pytest.raises(UserError, match="a probe needs at least one picture, it was given none; name some photos"):
        probe(tiny_vae, [])


def test_probe_refuses_a_size_that_the_factor_does_not_divide(tiny_vae) -> None:
    with pytest.raises(UserError, match="image size 15x16 is not a multiple of 2"):
        probe(tiny_vae, [torch.zeros(1, 3, 15, 16)])


@torch.no_grad()
def test_probe_refuses_values_that_are_not_finite_in_float32(tiny_vae, x) -> None:
    tiny_vae.decoder.conv_in.bias.fill_(float("nan"))

    with pytest.raises(
        UserError, match=r"decoder\.conv_in gives values that are not finite in float32; the weights are"
    ):
        probe(tiny_vae, [x])


@pytest.fixture
def photos(tmp_path):
    """Ten pictures of 21x34 pixels, each of one grey; the third has only one row."""
    for index in range(10):
        size = (34, 1) if index == 2 else (34, 21)
        Image.new("RGB", size, (index, index, index)).save(tmp_path / f"{index}.png")
    return open_source(str(tmp_path))


def greys(pictures: list[torch.Tensor]) -> list[int]:
    return [round(float(x.mean() + 1) * 127.5) for x in pictures]


def test_load_pictures_spreads_them_over_the_source(photos) -> None:
    assert greys(load_pictures(photos, 4, limit=3, size=64)) == [0, 3, 6]


def test_load_pictures_takes_all_where_there_are_fewer(photos) -> None:
    assert greys(load_pictures(photos, 1, limit=99, size=64)) == list(range(10))


def test_load_pictures_takes_the_middle_in_multiples_of_the_factor(tmp_path) -> None:
    ramp = Image.linear_gradient("L").resize((34, 21)).convert("RGB")
    ramp.save(tmp_path / "ramp.png")

    (x,) = load_pictures(open_source(str(tmp_path)), 4, limit=1, size=18)

    assert x.shape == (1, 3, 16, 16)
    expected = torch.tensor([float(ramp.getpixel((9, 2 + row))[0]) for row in range(16)])
    torch.testing.assert_close((x[0, 0, :, 0] + 1) * 127.5, expected, rtol=0, atol=1e-3)


def test_load_pictures_refuses_one_below_the_factor(photos) -> None:
    with pytest.raises(UserError, match=r"2\.png is 1x34, smaller than the factor 4; leave it out"):
        load_pictures(photos, 4, limit=10, size=64)


@pytest.mark.parametrize(("limit", "size"), [(0, 64), (2, 3)])
def test_load_pictures_refuses_none_or_too_small(photos, limit, size) -> None:
    with pytest.raises(UserError, match=f"at least 1 picture of at least 4 pixels, not {limit} of {size}; raise the"):
        load_pictures(photos, 4, limit=limit, size=size)


def test_probe_covers_attention_at_every_level(x) -> None:
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )

    names = {layer.name for layer in probe(vae, [x]).layers}

    assert {"encoder.down_blocks.1.attentions.0.logits", "decoder.up_blocks.0.attentions.1.logits"} <= names
