"""What hangs on a module's call happens: hooks and offloaders keep the fast versions from passing them by."""

import copy

import accelerate
import pytest
import torch
from torch import Tensor, nn

from sd_vae import AutoencoderKL, ops

NEVER_CALLED = (nn.ModuleList, nn.Dropout)  # attention holds a dropout of nothing, which nobody needs to call


@pytest.fixture
def vae() -> AutoencoderKL:
    """Two levels, wide enough for the compiled kernels, without gradients."""
    two_levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, **two_levels).eval()
    return vae.requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(1, 3, 32, 40) * 2 - 1


def reconstruct(vae: AutoencoderKL, x: Tensor) -> Tensor:
    return vae.decode(vae.encode(x).latent_dist.mode()).sample


def group_offload(vae: AutoencoderKL, offload_type: str) -> None:
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type=offload_type, **blocks)


def test_without_hooks_the_blocks_are_passed_by(vae, x, monkeypatch) -> None:
    """So that the tests below see something: unhooked, no module of the decoder is called as it is."""
    calls: list[str] = []
    monkeypatch.setattr(type(vae.decoder), "forward", lambda *_: calls.append("decoder"))

    reconstruct(vae, x)

    assert calls == []


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hook_on_any_submodule_is_called(vae, x, register) -> None:
    expected, seen = [], []
    for name, module in vae.named_modules():
        if not name or isinstance(module, NEVER_CALLED):
            continue
        expected.append(name)
        hook = getattr(module, register)(lambda *_, name=name: seen.append(name))
        reconstruct(vae, x)
        hook.remove()

    assert list(dict.fromkeys(seen)) == expected


@pytest.mark.parametrize("name", ["encoder.conv_in", "decoder.up_blocks.0.resnets.0.norm2", "decoder.mid_block"])
def test_hook_may_change_what_a_submodule_returns(vae, x, assert_close, name) -> None:
    plain = reconstruct(vae, x)
    vae.get_submodule(name).register_forward_hook(lambda module, args, h: h.flip(-1))
    with ops.reference():
        expected = reconstruct(vae, x)

    changed = reconstruct(vae, x)

    # worst seen 1.0e-5, 20 seeds
    assert_close(changed, expected)
    assert (changed - plain).abs().max() > 1e-2 * plain.abs().max()


def test_hook_on_every_module_is_called(vae, x) -> None:
    seen: list[nn.Module] = []
    with_hook = nn.modules.module.register_module_forward_hook(lambda module, args, h: seen.append(module))

    with with_hook:
        reconstruct(vae, x)

    silent = [name for name, module in vae.named_modules() if name and module not in set(seen)]
    assert all(isinstance(vae.get_submodule(name), NEVER_CALLED) for name in silent)


def test_hooks_leave_the_numbers_alone(vae, x, assert_close) -> None:
    expected = reconstruct(vae, x)

    for module in vae.modules():
        module.register_forward_hook(lambda module, args, h: None)

    # the plain path against the fast one, worst seen 7.1e-6, 20 seeds
    assert_close(reconstruct(vae, x), expected)


@pytest.mark.parametrize("tiled", [False, True])
def test_sequential_offload_equals_the_model_in_memory(vae, x, assert_close, tiled: bool) -> None:
    expected = reconstruct(vae, x)

    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    vae.enable_tiling(tiled)

    assert {weight.device.type for weight in vae.parameters()} == {"meta"}
    # worst seen 7.7e-6, 20 seeds
    assert_close(reconstruct(vae, x), expected)
    assert {weight.device.type for weight in vae.parameters()} == {"meta"}


def test_sequential_offload_of_new_weights_is_not_answered_with_old_ones(vae, x, assert_close) -> None:
    reconstruct(vae, x)
    other = copy.deepcopy(vae)
    other.decoder.conv_in.weight.mul_(-1)
    expected = reconstruct(other, x)

    accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
    other.enable_tiling()

    assert_close(reconstruct(other, x), expected)


def test_model_offload_with_tiling_equals_the_untiled_result(vae, x, assert_close) -> None:
    expected = reconstruct(vae, x)

    vae, hook = accelerate.cpu_offload_with_hook(vae, execution_device=torch.device("cpu"))
    vae.enable_tiling()

    assert_close(reconstruct(vae, x), expected)
    hook.offload()


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_says_that_it_keeps_tiling_from_running(vae, x, assert_close, offload_type: str) -> None:
    expected = reconstruct(vae, x)
    group_offload(vae, offload_type)

    vae.enable_tiling()

    message = r"^encode runs untiled although tiling is on: .* is offloaded by groups; use enable_model_cpu_offload"
    with pytest.warns(UserWarning, match=message):
        posterior = vae.encode(x).latent_dist
    with pytest.warns(UserWarning, match=message.replace("encode", "decode", 1)):
        recon = vae.decode(posterior.mode()).sample
    assert_close(recon, expected)
