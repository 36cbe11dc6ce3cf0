"""Transformed weights: kept for inference within a budget, never stale, never in training, gone with their model."""

import copy
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from ops_cases import conv, draw, error, narrow_vae, needs_compiled

from sd_vae import ops
from sd_vae.autoencoder import AutoencoderKL

pytestmark = [needs_compiled, pytest.mark.usefixtures("any_size")]


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    from sd_vae.ops import weights

    weights.forget()
    yield
    weights.set_budget(weights.BUDGET_BYTES)
    weights.forget()


@pytest.fixture
def vae() -> AutoencoderKL:
    return narrow_vae(latent_channels=4)


Z = (1, 4, 16, 17)


def held() -> int:
    from sd_vae.ops import weights

    return weights.held_bytes()


@torch.no_grad()
def decode(vae: AutoencoderKL) -> torch.Tensor:
    return vae.decode(draw(*Z)).sample


def test_inference_keeps_and_finds_weights(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_vae.ops import weights

    first = decode(vae)
    monkeypatch.setattr(weights, "_transform", lambda *_: pytest.fail("transformed again"))

    assert torch.equal(decode(vae), first)
    assert held() > 0


@torch.no_grad()
@pytest.mark.parametrize("run", [ops.conv3x3, ops.upsample_conv])
def test_operations_keep_weights_outside_training(run: Callable[..., torch.Tensor]) -> None:
    module = conv(32, 32)

    run(draw(1, 32, 16, 16), module.train())
    in_training = held()
    run(draw(1, 32, 16, 16), module.eval())

    assert (in_training, held()) == (0, 32 * 32 * 36 * 4)


def test_nothing_is_kept_while_gradients_are_on() -> None:
    module, x = conv(32, 32).requires_grad_(), draw(1, 32, 16, 16).requires_grad_()

    ops.conv3x3(x, module).sum().backward()

    assert held() == 0


def test_nothing_is_kept_in_training_mode_without_gradients(vae: AutoencoderKL) -> None:
    decode(vae.train())

    assert held() == 0


def test_nothing_is_kept_while_tiling(vae: AutoencoderKL) -> None:
    vae.enable_tiling()

    decode(vae)

    assert held() == 0


@pytest.mark.parametrize(
    "drop",
    [
        lambda vae: vae.train(),
        lambda vae: vae.load_state_dict(vae.state_dict()),
        lambda vae: vae.to(torch.float64),
        lambda vae: vae.half(),
    ],
    ids=["train", "load_state_dict", "to", "half"],
)
def test_kept_weights_are_dropped(vae: AutoencoderKL, drop: Callable[[AutoencoderKL], object]) -> None:
    decode(vae)

    drop(vae)

    assert held() == 0


def test_forgetting_one_model_leaves_the_other(vae: AutoencoderKL) -> None:
    other = copy.deepcopy(vae)
    decode(vae)
    one = held()
    decode(other)

    ops.forget_weights(other)

    assert held() == one


def optimised(optimiser: torch.optim.Optimizer, vae: AutoencoderKL) -> None:
    for weight in vae.parameters():
        weight.grad = torch.ones_like(weight)
    optimiser.step()


def fuse_lora(vae: AutoencoderKL) -> None:
    conv = vae.decoder.mid_block.resnets[0].conv1
    conv.weight.data += (draw(64, 2) @ draw(2, 64 * 9, seed=1)).view(64, 64, 3, 3)


def edit_numpy(vae: AutoencoderKL) -> None:
    vae.decoder.mid_block.resnets[0].conv1.weight.detach().numpy()[3, 5, 1, 2] += 1


def swap_filters(vae: AutoencoderKL) -> None:
    weight = vae.decoder.mid_block.resnets[0].conv1.weight.data
    weight[[0, 1]] = weight[[1, 0]]


@pytest.mark.parametrize(
    "change",
    [
        lambda vae: optimised(torch.optim.AdamW(vae.parameters(), lr=1e-2, fused=True), vae),
        lambda vae: optimised(torch.optim.AdamW(vae.parameters(), lr=1e-2, foreach=True), vae),
        lambda vae: optimised(torch.optim.SGD(vae.parameters(), lr=1e-2), vae),
        fuse_lora,
        edit_numpy,
        swap_filters,
    ],
    ids=["fused_adamw", "adamw", "sgd", "lora", "numpy", "swap"],
)
def test_a_changed_weight_is_seen(vae: AutoencoderKL, change: Callable[[AutoencoderKL], object]) -> None:
    before = decode(vae)

    change(vae)

    with ops.reference():
        theirs = decode(vae)
    assert error(before, theirs) > 1e-3
    assert error(decode(vae), theirs) < 1e-4  # worst seen 5e-6


def test_the_smallest_change_is_seen() -> None:
    from sd_vae.ops import weights

    module = conv(32, 32)
    mark = weights._fingerprint(module.weight)

    for place in (0, 31, 32, -1):
        flat = module.weight.data.view(-1)
        flat[place] = torch.nextafter(flat[place], torch.tensor(torch.inf))
        assert weights._fingerprint(module.weight) != mark
        mark = weights._fingerprint(module.weight)


def test_weights_stay_within_the_budget(vae: AutoencoderKL) -> None:
    from sd_vae.ops import weights

    weights.set_budget(600_000)

    first = decode(vae)

    assert 0 < held() <= 600_000
    assert torch.equal(decode(vae), first)


@torch.no_grad()
def test_weights_beyond_the_budget_are_not_even_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_vae.ops import weights

    module, x = conv(32, 32), draw(1, 32, 16, 16)
    kept = ops.conv3x3(x, module)
    weights.set_budget(0)
    monkeypatch.setattr(weights, "_fingerprint", lambda _: pytest.fail("hashed"))

    assert torch.equal(ops.conv3x3(x, module), kept)


def test_a_smaller_budget_lets_go_at_once(vae: AutoencoderKL) -> None:
    from sd_vae.ops import weights

    decode(vae)

    weights.set_budget(700_000)
    some = held()
    weights.set_budget(0)

    assert 0 < some <= 700_000
    assert held() == 0


def test_a_dead_models_weights_are_freed(vae: AutoencoderKL) -> None:
    other = copy.deepcopy(vae)
    decode(other)
    assert held() > 0

    del other
    gc.collect()

    assert held() == 0
