"""`from_diffusers` and `to_diffusers` share weights; adapters and EMA work as on diffusers' class."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from sd_vae import AutoencoderKL, UserError, ops
from sd_vae._diffusers import DiffusersAutoencoderKL

LORA = {"r": 2, "target_modules": ["to_q", "conv1"], "init_lora_weights": False}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(1, 3, 16, 24) * 2 - 1


def test_interop_from_diffusers_shares_every_parameter(tiny_vae) -> None:
    theirs = tiny_vae.to_diffusers()

    ours = AutoencoderKL.from_diffusers(theirs)

    assert type(theirs) is DiffusersAutoencoderKL
    assert type(ours) is AutoencoderKL
    shared = dict(theirs.named_parameters())
    assert all(weight is shared[name] for name, weight in ours.named_parameters())
    assert len(shared) == len(dict(tiny_vae.named_parameters()))


def test_interop_training_ours_trains_theirs(tiny_vae, x, assert_close) -> None:
    theirs = tiny_vae.to_diffusers()
    before = copy.deepcopy(theirs.state_dict())

    tiny_vae(x).sample.mean().backward()
    torch.optim.SGD(tiny_vae.parameters(), lr=0.1).step()

    assert not torch.equal(theirs.decoder.conv_out.weight, before["decoder.conv_out.weight"])
    with torch.no_grad():
        # worst seen 2.7e-6, 20 seeds; weights kept from before the step would be far off
        assert_close(tiny_vae(x).sample, theirs(x).sample)


def test_interop_twin_keeps_dtype_device_mode_and_frozen_parameters(tiny_vae) -> None:
    tiny_vae.to(torch.bfloat16).train()
    tiny_vae.encoder.requires_grad_(False)

    theirs = tiny_vae.to_diffusers()

    assert theirs.dtype is torch.bfloat16
    assert theirs.device == tiny_vae.device
    assert theirs.training
    assert theirs.encoder.mid_block.training
    assert not any(weight.requires_grad for weight in theirs.encoder.parameters())
    assert all(weight.requires_grad for weight in theirs.decoder.parameters())


def test_interop_twin_keeps_a_scale_registered_over_a_default(tiny_vae) -> None:
    # `from_config` resets every field that was a default at first, unless its note of them is left out
    tiny_vae.register_to_config(scaling_factor=0.5)

    theirs = tiny_vae.to_diffusers()

    assert theirs.config.scaling_factor == 0.5
    assert AutoencoderKL.from_diffusers(theirs).config.scaling_factor == 0.5


def test_interop_twin_of_fused_projections_has_them_apart(tiny_vae, x) -> None:
    with torch.no_grad():
        with ops.reference():  # what diffusers computes, bit for bit
            expected = tiny_vae(x).sample

        tiny_vae.fuse_qkv_projections()

        assert torch.equal(tiny_vae.to_diffusers()(x).sample, expected)


def test_interop_from_diffusers_rejects_another_type() -> None:
    with pytest.raises(UserError, match=r"vae is of type str, it must be a diffusers\.AutoencoderKL; load it first\."):
        AutoencoderKL.from_diffusers("stabilityai/sd-vae-ft-mse")


def test_interop_lora_adapter_can_be_added_and_removed(tiny_vae, x, assert_close) -> None:
    with torch.no_grad():
        plain = tiny_vae(x).sample

        tiny_vae.add_adapter(LoraConfig(**LORA))
        adapted = tiny_vae(x).sample
        tiny_vae.disable_adapters()

        assert (adapted - plain).abs().max() > 1e-2 * plain.abs().max()
        assert_close(tiny_vae(x).sample, plain)
        assert any("lora_A" in name for name in tiny_vae.state_dict())


def test_interop_lora_adapter_equals_diffusers(tiny_vae, x, assert_close) -> None:
    theirs = copy.deepcopy(tiny_vae.to_diffusers())
    for vae in (tiny_vae, theirs):
        vae.add_adapter(LoraConfig(**LORA))
    theirs.load_state_dict(tiny_vae.state_dict())

    with torch.no_grad():
        # worst seen 3.2e-6, 20 seeds
        assert_close(tiny_vae(x).sample, theirs(x).sample)


def test_interop_to_diffusers_rejects_a_model_with_adapters(tiny_vae) -> None:
    tiny_vae.add_adapter(LoraConfig(**LORA))

    with pytest.raises(UserError, match=r"tensors are not those of its config, see .*; unload its adapters first\."):
        tiny_vae.to_diffusers()


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name:FutureWarning")  # EMAModel's call
def test_interop_ema_of_diffusers_saves_and_loads_our_class(tiny_vae, tmp_path: Path) -> None:
    ema = EMAModel(tiny_vae.parameters(), model_cls=AutoencoderKL, model_config=tiny_vae.config)
    ema.step(tiny_vae.parameters())

    ema.save_pretrained(tmp_path)

    reloaded = EMAModel.from_pretrained(tmp_path, model_cls=AutoencoderKL)
    pairs = zip(reloaded.shadow_params, ema.shadow_params, strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)
