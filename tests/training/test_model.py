"""What trains, what a run ends with, and what it says of the latent space."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae
from sd_vae.errors import UserError
from training import resume, train
from training.certificate import LatentSpace
from training.config import ModelConfig
from training.model import plain_vae, prepare_training_

LORA = {"trainable": "lora", "lora_rank": 2, "lora_alpha": 4.0}


def trained_parts(vae: AutoencoderKL) -> set[str]:
    return {name for name, parameter in vae.named_parameters() if parameter.requires_grad}


def test_named_parts_train_alone(tiny_vae: AutoencoderKL) -> None:
    prepare_training_(tiny_vae, ModelConfig(trainable="parts", parts=("decoder.conv_out", "decoder.up_blocks.1")))

    names = trained_parts(tiny_vae)
    assert {"decoder.conv_out.weight", "decoder.conv_out.bias"} <= names
    assert all(name.startswith(("decoder.conv_out.", "decoder.up_blocks.1.")) for name in names)


def test_a_part_ends_where_its_name_ends(tiny_vae: AutoencoderKL) -> None:
    prepare_training_(tiny_vae, ModelConfig(trainable="parts", parts=("decoder.conv_norm_out",)))

    assert trained_parts(tiny_vae) == {"decoder.conv_norm_out.weight", "decoder.conv_norm_out.bias"}
    with pytest.raises(
        UserError, match=r"model.parts names 'decoder.conv', which no parameter is in; choose from: dec"
    ):
        prepare_training_(tiny_vae, ModelConfig(trainable="parts", parts=("decoder.conv",)))


def test_lora_trains_additions_to_the_decoder_alone(tiny_vae: AutoencoderKL) -> None:
    parameters = prepare_training_(tiny_vae, ModelConfig(**LORA))

    names = trained_parts(tiny_vae)
    assert len(names) == len(parameters)
    assert all(name.startswith("decoder.") and ".lora_" in name for name in names)
    assert any("mid_block.attentions.0.to_q.lora_A" in name for name in names)
    assert any("conv_out.lora_B" in name for name in names)


def test_lora_begins_as_the_network_it_adds_to(tiny_vae: AutoencoderKL, assert_close: Callable[..., None]) -> None:
    z = torch.randn(1, 4, 8, 8)
    before = tiny_vae.decode(z).sample

    prepare_training_(tiny_vae, ModelConfig(**LORA))

    # Adapters add zeros, and keep the fast kernels from their layers: what differs is rounding.
    assert_close(tiny_vae.decode(z).sample, before, 1e-5)


def test_plain_vae_of_lora_is_merged_and_leaves_the_trained_one_alone(tiny_vae: AutoencoderKL) -> None:
    start = {name: value.clone() for name, value in tiny_vae.state_dict().items()}
    prepare_training_(tiny_vae, ModelConfig(**LORA))
    with torch.no_grad():
        for name, parameter in tiny_vae.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
    z = torch.randn(1, 4, 8, 8)
    expected = tiny_vae.decode(z).sample
    with_additions = {name: value.clone() for name, value in tiny_vae.state_dict().items()}

    plain = plain_vae(tiny_vae)

    # worst seen 3e-6 of outputs around 1: the sum of weights rounds differently
    torch.testing.assert_close(plain.decode(z).sample, expected, rtol=0, atol=5e-5)
    assert plain.state_dict().keys() == start.keys()
    assert not torch.equal(plain.decoder.conv_out.weight, start["decoder.conv_out.weight"])
    assert all(torch.equal(with_additions[name], value) for name, value in tiny_vae.state_dict().items())


def test_a_lora_run_resumes_and_ends_with_a_plain_vae_of_the_same_encoder(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import trainer

    config = make_config(model=LORA, loss={"kl": _no_kl()})
    whole = train(config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "_agree", lambda self, request: self.progress.step == 2)
        train(make_config("parts", model=LORA, loss={"kl": _no_kl()}))
    parts = resume(make_config("parts").out)

    ours, theirs = load_vae(whole.vae).state_dict(), load_vae(parts.vae).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    start = load_vae(config.model.pretrained).state_dict()
    changed = {name for name, value in start.items() if not torch.equal(value, ours[name])}
    assert changed
    assert all(name.startswith("decoder.") and name.endswith(".weight") for name in changed)
    assert whole.report["latents"]["encoder"] == "unchanged"


def test_a_lora_run_leaves_its_additions_in_the_format_of_peft(make_config: Any) -> None:
    import diffusers
    from peft import PeftModel

    config = make_config(model=LORA, loss={"kl": _no_kl()}, ema_decay=0.5)
    result = train(config)
    base = diffusers.AutoencoderKL.from_pretrained(config.model.pretrained)
    z = torch.randn(1, 4, 8, 8)
    before = base.decode(z).sample

    adapted = PeftModel.from_pretrained(base, result.folder / "adapter").eval()

    expected = load_vae(result.vae).decode(z).sample
    torch.testing.assert_close(adapted.decode(z).sample, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-3)


def test_additions_name_what_they_are_to_without_a_path_of_this_machine(make_config: Any) -> None:
    config = make_config(model=LORA, steps=1, loss={"kl": _no_kl()})

    folder = train(config).folder / "adapter"

    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "start"
    assert (settings["r"], settings["lora_alpha"], settings["inference_mode"]) == (2, 4.0, True)
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_run_without_lora_leaves_no_adapter(make_config: Any) -> None:
    assert not (train(make_config(steps=1)).folder / "adapter").exists()


def _no_kl() -> Any:
    from sd_vae.losses import KLConfig

    return KLConfig(weight=0.0)


def test_a_run_with_a_discriminator_resumes_to_the_bit(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    from sd_vae.losses import AdversarialConfig
    from training import trainer

    gan = AdversarialConfig(weight=0.5, width=8, num_layers=1, norm="spectral", lecam_weight=0.1, start_step=1)
    settings: dict[str, Any] = {"loss": {"adversarial": gan, "learn_logvar": True}, "gradient_accumulation_steps": 2}
    whole = train(make_config("whole", **settings))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "_agree", lambda self, request: self.progress.step == 3)
        train(make_config("parts", **settings))
    parts = resume(make_config("parts").out)

    for name in ("model", "ema", "discriminator", "lecam", "output"):
        one, other = (load_file(run.folder / "checkpoints" / "last" / f"{name}.safetensors") for run in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], value) for key, value in other.items()), name


def test_averaged_weights_advance_once_a_step_of_both_networks(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd_vae.losses import AdversarialConfig
    from training.ema import EMA

    calls, update = [], EMA.update_parameters
    monkeypatch.setattr(EMA, "update_parameters", lambda self, vae: (calls.append(1), update(self, vae)))

    train(make_config(steps=3, loss={"adversarial": AdversarialConfig(weight=0.5, width=8, num_layers=1)}))

    assert len(calls) == 3


def test_latent_space_certifies_an_untouched_encoder(tiny_vae: AutoencoderKL) -> None:
    space = LatentSpace(tiny_vae, torch.rand(2, 3, 16, 16), torch.device("cpu"), equivariance=False)
    with torch.no_grad():
        tiny_vae.decoder.conv_out.weight.add_(1.0)

    found = space.compare(tiny_vae)

    assert found["encoder"] == "unchanged"
    assert "drift" not in found


def test_latent_space_measures_shift_and_scale_of_each_channel(tiny_vae: AutoencoderKL) -> None:
    photos = torch.rand(2, 3, 16, 16)
    space = LatentSpace(tiny_vae, photos, torch.device("cpu"), equivariance=False)
    std = space.means[1].std()
    with torch.no_grad():
        tiny_vae.quant_conv.weight[0].mul_(-2.0)
        tiny_vae.quant_conv.bias[0].mul_(-2.0)
        tiny_vae.quant_conv.bias[1].add_(0.5)

    drift = space.compare(tiny_vae)["drift"]

    assert drift["scale"] == pytest.approx([2.0, 1.0, 1.0, 1.0], rel=1e-4)
    assert drift["correlation"] == pytest.approx([-1.0, 1.0, 1.0, 1.0], rel=1e-4)
    assert drift["shift"][1:] == pytest.approx([float(0.5 / std), 0.0, 0.0], rel=1e-4, abs=1e-6)


def test_a_run_says_at_its_end_what_became_of_the_latents(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="training"):
        train(make_config())

    (line,) = (record.getMessage() for record in caplog.records if record.name == "training.certificate")
    assert line.startswith("latents: drifted from those of the weights before, so train models on them anew (shift in")
    assert "; channel 3: " in line
