"""A half-precision run that overflows is repeated with a warning that names the layer, or raised; never returned."""

import copy
import threading

import pytest
import torch

from sd_vae import UserError, set_overflow
from sd_vae.half_precision.overflow import wider_dtype

REPEATED = r"decode overflowed float16 at decoder\.conv_in \(largest magnitude .*, it holds 65504\), so it was repeated"


@torch.no_grad()
def test_decode_in_float16_is_repeated_where_it_overflows(make_loud, z) -> None:
    vae = make_loud()
    expected = vae.decode(z).sample

    with pytest.warns(RuntimeWarning, match=REPEATED + " in float32; load the VAE in bfloat16 or float32, or convert"):
        x = vae.half().decode(z.half()).sample

    assert x.dtype == torch.float16
    # worst of 20 models 1.4e-3: weights and input are rounded to float16
    torch.testing.assert_close(x.float(), expected, rtol=0, atol=1e-2 * float(expected.abs().max()))


@torch.no_grad()
def test_encode_in_float16_is_repeated_where_it_overflows(make_loud, x) -> None:
    vae = make_loud("encoder")
    expected = vae.encode(x).latent_dist.mean

    with pytest.warns(RuntimeWarning, match=r"encode overflowed float16 at encoder\.conv_in .* repeated in float32"):
        mean = vae.half().encode(x.half()).latent_dist.mean

    torch.testing.assert_close(mean.float(), expected, rtol=0, atol=1e-2 * float(expected.abs().max()))


@torch.no_grad()
def test_repeated_decode_equals_the_float32_run_of_the_same_weights(make_loud, z) -> None:
    vae = make_loud().half()
    expected = copy.deepcopy(vae).float().decode(z.half().float()).sample

    with pytest.warns(RuntimeWarning, match=REPEATED):
        x = vae.decode(z.half()).sample

    # Nothing but the last rounding to float16, 2^-11; bfloat16 or float16 anywhere inside would be 1.4e-3 and more.
    torch.testing.assert_close(x.float(), expected, rtol=0, atol=6e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_repeated_decode_keeps_the_live_weights(make_loud, z) -> None:
    vae = make_loud().half()
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in vae.named_parameters()}

    with pytest.warns(RuntimeWarning, match=REPEATED):
        vae.decode(z.half())

    for name, weight in vae.named_parameters():
        assert weight.data_ptr() == before[name][0]
        assert torch.equal(weight, before[name][1])


@torch.no_grad()
@pytest.mark.parametrize("switch", ["enable_tiling", "enable_slicing"])
def test_repeated_decode_takes_the_path_of_the_first(make_loud, z, switch) -> None:
    vae = make_loud()
    getattr(vae, switch)()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 16
    expected = vae.decode(z).sample

    with pytest.warns(RuntimeWarning, match=REPEATED):
        x = vae.half().decode(z.half()).sample

    torch.testing.assert_close(x.float(), expected, rtol=0, atol=1e-2 * float(expected.abs().max()))


@torch.no_grad()
def test_a_picture_beyond_float16_is_returned_in_float32(tiny_vae, z) -> None:
    tiny_vae.decoder.conv_out.weight.mul_(2.0**17)

    with pytest.warns(RuntimeWarning, match=r"at decoder\.conv_out"):
        x = tiny_vae.half().decode(z.half()).sample

    assert x.dtype == torch.float32
    assert float(x.abs().max()) > torch.finfo(torch.float16).max


@torch.no_grad()
def test_overflow_names_the_sum_where_only_the_sum_overflows(tiny_vae, z) -> None:
    resnet = tiny_vae.decoder.mid_block.resnets[0]
    for layer in (tiny_vae.decoder.conv_in, resnet.conv2):
        layer.weight.zero_()
        layer.bias.fill_(40_000.0)

    with pytest.warns(RuntimeWarning, match=r"at the sum after decoder\.mid_block\.resnets\.0\.conv2 .*magnitude 8e\+"):
        tiny_vae.half().decode(z.half())


@torch.no_grad()
@pytest.mark.usefixtures("raising")
def test_overflow_is_raised_where_the_caller_chose_so(make_loud, z) -> None:
    vae = make_loud().half()

    with pytest.raises(UserError, match=r'decode overflowed float16 at decoder\.conv_in .*; set_overflow is "raise": '):
        vae.decode(z.half())


@torch.no_grad()
def test_weights_that_are_not_finite_are_named(tiny_vae, z) -> None:
    tiny_vae.decoder.conv_out.bias.fill_(1e5)  # float32 holds it, float16 does not

    with pytest.raises(UserError, match=r"1 weight tensor is not finite, decoder\.conv_out\.bias; load the VAE in "):
        tiny_vae.half().decode(z.half())


@torch.no_grad()
def test_an_input_that_overflows_every_dtype_is_refused(tiny_vae, z) -> None:
    tiny_vae.bfloat16().decoder.conv_out.weight.fill_(1e38)

    with pytest.raises(UserError, match=r"overflowed bfloat16 at .*, and float32 too; give it images in \[-1, 1\] or"):
        tiny_vae.decode(z.bfloat16())


@torch.no_grad()
def test_a_half_precision_input_that_is_not_finite_is_blamed(tiny_vae, z) -> None:
    z[0, 0, 0, 0] = float("inf")

    with pytest.raises(UserError, match="decode was given 1 values that are not finite"):
        tiny_vae.half().decode(z.half())


@torch.no_grad()
def test_autocast_that_overflows_is_repeated_without_autocast(make_loud, z) -> None:
    vae = make_loud()
    expected = vae.decode(z).sample

    with pytest.warns(RuntimeWarning, match=REPEATED), torch.autocast("cpu", torch.float16):
        x = vae.decode(z).sample

    # Nothing but the last rounding to float16, 2^-11; bfloat16 or float16 anywhere inside would be 1.4e-3 and more.
    torch.testing.assert_close(x.float(), expected, rtol=0, atol=6e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_repeated_decode_runs_compiled_layers_as_written(make_loud, z) -> None:
    vae = make_loud().half()
    num_compiled = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        num_compiled.append(graph)
        return graph

    layer = vae.decoder.conv_in
    layer._compiled_call_impl = torch.compile(layer._call_impl, backend=count)

    with pytest.warns(RuntimeWarning, match=REPEATED):
        vae.decode(z.half())

    assert len(num_compiled) == 1


def test_repeated_decode_has_gradients_to_the_live_weights(make_loud, z) -> None:
    vae = make_loud().half()

    with pytest.warns(RuntimeWarning, match=REPEATED):
        vae.decode(z.half()).sample.float().sum().backward()

    assert bool(vae.decoder.conv_out.weight.grad.abs().sum() > 0)


def test_training_under_autocast_is_left_alone(make_loud, z) -> None:
    vae = make_loud().train()

    with torch.autocast("cpu", torch.float16):
        x = vae.decode(z).sample

    assert not bool(x.isfinite().all())


@pytest.mark.parametrize("has_gradients", [True, False])
def test_weights_in_half_precision_are_watched_in_training_mode_too(make_loud, z, has_gradients) -> None:
    vae = make_loud().half().train()

    with torch.set_grad_enabled(has_gradients), pytest.warns(RuntimeWarning, match=REPEATED):
        x = vae.decode(z.half()).sample

    assert bool(x.isfinite().all())


@torch.no_grad()
def test_a_repeated_run_does_not_touch_other_threads(make_loud, tiny_vae, z) -> None:
    other = copy.deepcopy(tiny_vae).half()
    dtypes: set[torch.dtype] = set()
    vae = make_loud().half()
    original = vae._decode

    def decode(*given: object, **options: object) -> object:
        with torch.no_grad():
            thread = threading.Thread(target=lambda: dtypes.add(other.decoder.conv_in(z.half()).dtype))
            thread.start()
            thread.join()
        return original(*given, **options)

    vae._decode = decode

    with pytest.warns(RuntimeWarning, match=REPEATED):
        vae.decode(z.half())

    assert dtypes == {torch.float16}


def test_set_overflow_refuses_another_policy() -> None:
    with pytest.raises(UserError, match=r"unknown overflow policy 'ignore'; choose repeat or raise\."):
        set_overflow("ignore")


def test_wider_dtype_is_float32_without_a_gpu() -> None:
    for half in (torch.float16, torch.bfloat16):
        assert wider_dtype(half, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("supported", "wide"), [(True, torch.bfloat16), (False, torch.float32)])
def test_wider_dtype_is_bfloat16_on_a_gpu_that_computes_in_it(monkeypatch, supported, wide) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: supported)

    assert wider_dtype(torch.float16, torch.device("cuda")) == wide
    assert wider_dtype(torch.bfloat16, torch.device("cuda")) == torch.float32
