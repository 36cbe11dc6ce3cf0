"""Encode and decode in row bands equal the untiled plain path: every size, band height, batch, config, measure."""

import warnings

import pytest
import torch
from banded_cases import BOUND, CONFIGS, NARROW, draw, in_measure, make_vae, plain, plain_half, relative, run
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from sd_vae import PRESETS, ops
from sd_vae.banded.measures import Measure
from sd_vae.ops.dispatch import compiled_unavailable

ACTIONS = ["encode", "decode"]
PLAIN = [Measure(1, compiled=False), Measure(1, compiled=False, spilled=True)]
KINDS = [Measure(1, compiled=True), *PLAIN] if compiled_unavailable() is None else PLAIN
SMALL = make_vae()


@pytest.mark.parametrize("action", ACTIONS)
@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    batch_size=st.integers(1, 3),
    band_bytes=st.integers(1, 2**18),
    kind=st.sampled_from(KINDS),
    keep=st.booleans(),
)
def test_bands_of_any_height_equal_untiled(action, height, width, batch_size, band_bytes, kind, keep) -> None:
    x = draw(SMALL, action, height, width, batch_size, seed=height)
    measure = Measure(band_bytes, kind.compiled, kind.spilled)

    ours = in_measure(SMALL, action, x, measure, keep=keep)

    assert relative(ours, plain_half(SMALL, action, x)) <= BOUND


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_bands_of_every_config_equal_untiled(name, action) -> None:
    vae = make_vae(CONFIGS[name])
    x = draw(vae, action, 5, 3, batch_size=2)

    for measure in KINDS:
        assert relative(in_measure(vae, action, x, measure), plain_half(vae, action, x)) <= BOUND


@pytest.mark.parametrize("action", ACTIONS)
def test_tiling_of_the_smallest_latent_equals_untiled(action) -> None:
    # with 32 groups two values would be a group of their own, and rounding their sign: channels_last moves that by 2e-3
    vae = make_vae(PRESETS["sd1"].to_dict() | NARROW | {"norm_num_groups": 8})
    vae.enable_tiling()
    x = draw(vae, action, 1, 1)

    assert relative(run(vae, action, x), plain(vae, action, x)) <= BOUND


@pytest.mark.parametrize("action", ACTIONS)
def test_tiling_of_a_large_odd_latent_equals_untiled(action) -> None:
    vae = make_vae()
    vae.enable_tiling(max_memory_gib=0.5)
    x = draw(vae, action, 97, 193)

    assert relative(run(vae, action, x), plain(vae, action, x)) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
def test_tiling_of_a_large_picture_equals_untiled(action) -> None:
    vae = make_vae(PRESETS["sd1"].to_dict() | NARROW)
    vae.enable_tiling()
    x = draw(vae, action, 97, 193)  # 776x1544 pixels

    assert relative(run(vae, action, x), plain(vae, action, x)) <= BOUND


@pytest.mark.parametrize("action", ACTIONS)
def test_bands_do_not_depend_on_the_batch(action) -> None:
    x = draw(SMALL, action, 6, 5, batch_size=3)

    together = in_measure(SMALL, action, x, KINDS[0])

    apart = torch.cat([in_measure(SMALL, action, picture, KINDS[0]) for picture in x.split(1)])
    assert torch.equal(together, apart)


@pytest.mark.parametrize("action", ACTIONS)
def test_bands_leave_their_input_alone(action) -> None:
    x = draw(SMALL, action, 6, 5)
    before = x.clone()

    for measure in KINDS:
        in_measure(SMALL, action, x, measure)

    assert torch.equal(x, before)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every other column"])
def test_bands_take_any_layout(action, layout) -> None:
    x = draw(SMALL, action, 6, 6)
    expected = plain_half(SMALL, action, x)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.mT.contiguous().mT
    else:
        x = x.repeat_interleave(2, dim=3)[..., ::2]

    for measure in KINDS:
        assert relative(in_measure(SMALL, action, x, measure), expected) <= BOUND


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("measure", KINDS, ids=str)
def test_bands_run_lora_adapters(action, measure) -> None:
    vae = make_vae()
    targets = ["conv1", "conv2", "conv", "conv_shortcut", "to_q", "conv_in", "conv_out"]
    vae.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    x = draw(vae, action, 5, 6)
    expected = plain_half(vae, action, x)

    ours = in_measure(vae, action, x, measure)

    vae.disable_adapters()
    assert relative(ours, expected) <= BOUND
    assert relative(plain_half(vae, action, x), expected) > 100 * BOUND  # the adapters matter


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("processor", ["AttnProcessor", "ours"])
def test_bands_run_custom_attention_processors(action, processor) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    class Doubling(AttnProcessor):
        """What nobody else computes: a processor that is skipped shows."""

        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    vae = make_vae()
    x = draw(vae, action, 5, 6)
    usual = plain_half(vae, action, x)
    vae.set_attn_processor(AttnProcessor() if processor == "AttnProcessor" else Doubling())

    ours = in_measure(vae, action, x, KINDS[0])

    assert relative(ours, plain_half(vae, action, x)) <= BOUND
    assert (relative(ours, usual) > 100 * BOUND) == (processor == "ours")


@pytest.mark.parametrize("action", ACTIONS)
def test_bands_run_hooks_of_convolutions(action) -> None:
    vae = make_vae()
    x = draw(vae, action, 5, 6)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *call: 1.1 * call[-1])

    for measure in KINDS:
        assert relative(in_measure(vae, action, x, measure), plain_half(vae, action, x)) <= BOUND


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", ["decoder", "decoder.mid_block.resnets.0", "decoder.up_blocks.0.resnets.0.norm2"])
def test_tiling_with_a_hook_that_bands_would_pass_by_warns_and_runs_untiled(name, register) -> None:
    vae, seen = make_vae(), []
    vae.enable_tiling()
    getattr(vae.get_submodule(name), register)(lambda *_: seen.append(name))

    with pytest.warns(UserWarning, match="decode runs untiled although tiling is on: .* has a hook, which bands would"):
        run(vae, "decode", draw(vae, "decode", 3, 3))

    assert seen == [name]


def test_tiling_with_a_replaced_forward_warns_and_runs_untiled() -> None:
    vae = make_vae()
    vae.enable_tiling()
    resnet = vae.decoder.mid_block.resnets[0]
    resnet.forward = lambda x: 2 * x

    with pytest.warns(UserWarning, match=r"mid_block\.resnets\.0 has a hook"):
        ours = run(vae, "decode", draw(vae, "decode", 3, 3))

    assert relative(ours, plain(vae, "decode", draw(vae, "decode", 3, 3))) <= BOUND


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("measure", PLAIN, ids=str)
def test_bands_in_float64_are_exact(action, measure) -> None:
    vae = make_vae().double()
    x = draw(vae, action, 7, 5)

    # GroupNorm's scale and shift are rounded to fp32
    assert relative(in_measure(vae, action, x, measure), plain_half(vae, action, x)) <= 1e-6


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("measure", PLAIN, ids=str)
def test_bands_in_half_precision_are_as_good_as_untiled(action, dtype, measure) -> None:
    vae = make_vae()
    x = draw(vae, action, 9, 7).to(dtype).float()  # what both precisions can be given
    exact = plain_half(vae, action, x)
    vae.to(dtype)

    ours = in_measure(vae, action, x.to(dtype), measure)

    assert ours.dtype is dtype
    untiled = plain_half(vae, action, x.to(dtype))
    mean_error = [float((result.float() - exact).abs().mean()) for result in (ours, untiled)]
    assert mean_error[0] <= 1.5 * mean_error[1]


def test_bands_with_a_huge_mean_equal_untiled() -> None:
    vae = make_vae()
    torch.nn.init.constant_(vae.decoder.conv_in.bias, 1e3)
    x = draw(vae, "decode", 9, 7)
    exact = plain_half(vae.double(), "decode", x.double())

    ours = in_measure(vae.float(), "decode", x, KINDS[0])

    assert relative(ours, exact) <= BOUND


@pytest.mark.parametrize("action", ACTIONS)
def test_tiled_methods_run_bands_and_leave_the_switch_alone(action, monkeypatch) -> None:
    vae = make_vae()
    x = draw(vae, action, 5, 6)
    ran = []
    original = Measure.run
    monkeypatch.setattr(Measure, "run", lambda self, *a, **k: ran.append(self) or original(self, *a, **k))

    with torch.no_grad(), ops.reference():
        result = getattr(vae, f"tiled_{action}")(x, return_dict=False)[0]

    ours = result.parameters if action == "encode" else result
    assert len(ran) == 1
    assert not vae.use_tiling
    assert relative(ours, plain(vae, action, x)) <= BOUND


@pytest.mark.parametrize("action", ACTIONS)
def test_tiling_with_gradients_warns_and_runs_untiled(action) -> None:
    vae = make_vae()
    vae.enable_tiling()
    x = draw(vae, action, 3, 3)

    with pytest.warns(UserWarning, match=f"{action} runs untiled although tiling is on: gradients are recorded"):
        result = getattr(vae, action)(x, return_dict=False)[0]

    (result.parameters if action == "encode" else result).sum().backward()
    half = vae.encoder if action == "encode" else vae.decoder
    assert all(weight.grad is not None for weight in half.parameters())


def test_tiling_under_no_grad_does_not_warn() -> None:
    vae = make_vae()
    vae.enable_tiling()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(vae, "decode", draw(vae, "decode", 3, 3))


def test_tiling_of_another_activation_warns_and_runs_untiled() -> None:
    vae = make_vae(CONFIGS["one level"] | {"act_fn": "gelu"})
    vae.enable_tiling()
    x = draw(vae, "decode", 3, 3)

    with pytest.warns(UserWarning, match="nonlinearity is GELU, and bands are written for SiLU"):
        ours = run(vae, "decode", x)

    assert relative(ours, plain(vae, "decode", x)) <= BOUND
