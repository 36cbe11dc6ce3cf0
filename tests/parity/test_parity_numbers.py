"""Ours against diffusers with the same weights: outputs, posterior moments, gradients.

The same operations run in the same memory layout, so everything forward is bit-equal, and so are the gradients but for
quant_conv's, where autograd adds the terms of our KL in another order. Worst seen 1.9e-7 of the largest gradient of its
tensor, over every config, eval and train mode, both layouts; the contract is 1e-5.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sd_vae import AutoencoderKL
from sd_vae._diffusers import DiffusersAutoencoderKL

GRADIENT_BOUND = 1e-6


class Numbers(NamedTuple):
    mean: Tensor
    logvar: Tensor
    z: Tensor
    recon: Tensor
    kl: Tensor
    gradients: dict[str, Tensor]


def measure(vae: AutoencoderKL | DiffusersAutoencoderKL, x: Tensor) -> Numbers:
    """Everything that a training step computes, with the same noise each time."""
    vae.zero_grad()
    x = x[:, : vae.config.in_channels]
    posterior = vae.encode(x).latent_dist
    z = posterior.sample(torch.Generator().manual_seed(2))
    recon = vae.decode(z).sample
    kl = posterior.kl()
    (recon.square().mean() + 1e-3 * kl.mean()).backward()
    gradients = {name: weight.grad.clone() for name, weight in vae.named_parameters()}
    return Numbers(*(value.detach() for value in (posterior.mean, posterior.logvar, z, recon, kl)), gradients)


def assert_same_numbers(ours: Numbers, theirs: Numbers) -> None:
    for name in ("mean", "logvar", "z", "recon"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-6, atol=0)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, expected in theirs.gradients.items():
        difference = (ours.gradients[name] - expected).abs().max()
        assert difference <= GRADIENT_BOUND * expected.abs().max(), f"{name}: {difference}"


def test_every_config_equals_diffusers(pair, picture, large_picture) -> None:
    ours, theirs = pair
    # where the factor is small, attention over a large picture takes half a minute
    x = large_picture if ours.factor == 8 else picture

    assert_same_numbers(measure(ours, x), measure(theirs, x))


def test_training_mode_equals_diffusers(small_pair, picture) -> None:
    ours, theirs = (vae.train() for vae in small_pair)

    assert_same_numbers(measure(ours, picture), measure(theirs, picture))


def test_channels_last_equals_diffusers(small_pair, picture) -> None:
    ours, theirs = (vae.to(memory_format=torch.channels_last) for vae in small_pair)
    x = picture.contiguous(memory_format=torch.channels_last)

    assert_same_numbers(measure(ours, x), measure(theirs, x))


def test_layout_of_the_result_equals_diffusers(small_pair, picture) -> None:
    ours, theirs = small_pair

    with torch.no_grad():
        assert ours(picture).sample.stride() == theirs(picture).sample.stride()


def test_gradient_checkpointing_equals_diffusers(small_pair, picture) -> None:
    ours, theirs = (vae.train() for vae in small_pair)
    ours.enable_gradient_checkpointing()
    theirs.enable_gradient_checkpointing()

    assert_same_numbers(measure(ours, picture), measure(theirs, picture))


def test_gradient_checkpointing_equals_without(small_pair, picture) -> None:
    ours = small_pair[0].train()
    plain = measure(ours, picture)

    ours.enable_gradient_checkpointing()

    recomputed = measure(ours, picture)
    assert torch.equal(recomputed.recon, plain.recon)
    assert all(torch.equal(recomputed.gradients[name], plain.gradients[name]) for name in plain.gradients)


def test_forward_equals_diffusers_by_mode_and_by_sample(small_pair, picture) -> None:
    ours, theirs = small_pair

    for sample_posterior in (False, True):
        settings = {"sample_posterior": sample_posterior, "return_dict": False}
        with torch.no_grad():
            mine = ours(picture, generator=torch.Generator().manual_seed(3), **settings)[0]
            other = theirs(picture, generator=torch.Generator().manual_seed(3), **settings)[0]
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_equal_diffusers(small_pair, picture, dtype) -> None:
    ours, theirs = (vae.to(dtype) for vae in small_pair)

    with torch.no_grad():
        assert torch.equal(ours(picture.to(dtype)).sample, theirs(picture.to(dtype)).sample)


def test_autocast_equals_diffusers(small_pair, picture) -> None:
    ours, theirs = small_pair

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(picture).sample, theirs(picture).sample)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3)])
def test_smallest_latents_decode_like_diffusers(small_pair, size) -> None:
    ours, theirs = small_pair
    z = torch.randn(1, 4, *size)

    with torch.no_grad():
        assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)


def test_full_width_sd1_equals_diffusers() -> None:
    ours = AutoencoderKL.from_preset("sd1").eval()
    theirs = ours.to_diffusers()
    x = torch.rand(1, 3, 64, 72) * 2 - 1

    with torch.no_grad():
        mine, other = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
        assert torch.equal(mine.parameters, other.parameters)
        assert torch.equal(ours.decode(mine.mean).sample, theirs.decode(other.mean).sample)


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
def test_attention_processors_equal_diffusers(small_pair, picture, processor) -> None:
    from diffusers.models import attention_processor

    ours, theirs = small_pair
    for vae in small_pair:
        vae.set_attn_processor(getattr(attention_processor, processor)())

    with torch.no_grad():
        assert torch.equal(ours(picture).sample, theirs(picture).sample)


def test_default_attention_processor_equals_diffusers(small_pair, picture) -> None:
    ours, theirs = small_pair
    for vae in small_pair:
        vae.set_default_attn_processor()

    with torch.no_grad():
        assert torch.equal(ours(picture).sample, theirs(picture).sample)


def test_fused_projections_equal_diffusers_and_unfuse(small_pair, picture) -> None:
    ours, theirs = small_pair
    with torch.no_grad():
        plain = ours(picture).sample

        for vae in small_pair:
            vae.fuse_qkv_projections()
        fused, expected = ours(picture).sample, theirs(picture).sample
        ours.unfuse_qkv_projections()

        assert torch.equal(fused, expected)
        assert torch.equal(ours(picture).sample, plain)
    # one wide product instead of three: worst seen 0, but another BLAS may split it otherwise
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("rows", [8, 24])
def test_tiling_equals_the_untiled_result(small_pair, picture, rows) -> None:
    ours, _ = small_pair
    with torch.no_grad():
        plain = ours(picture).sample
        ours.enable_tiling()
        tiled = ours(picture[..., :rows, :]).sample, ours(picture).sample

    torch.testing.assert_close(tiled[1], plain, rtol=0, atol=1e-5 * plain.abs().max().item())
    assert tiled[0].shape[-2] == rows


def test_slicing_equals_diffusers_slicing(small_pair, picture) -> None:
    for vae in small_pair:
        vae.enable_slicing()
    ours, theirs = small_pair

    with torch.no_grad():
        assert torch.equal(ours(picture).sample, theirs(picture).sample)
