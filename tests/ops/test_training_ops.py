"""Gradients of the compiled operations against the reference's in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_cases import conv, draw, error, narrow_vae, needs_compiled, wide
from torch import Tensor, nn

from sd_vae import ops
from sd_vae.ops import dispatch

pytestmark = [needs_compiled, pytest.mark.usefixtures("any_size")]

SIZES = [(16, 16), (11, 13), (1, 200), (64, 3)]
BOUND = 2e-5  # worst seen 3e-6 over x, weight, bias and residual


def convolve(x: Tensor, module: nn.Module, residual: Tensor) -> Tensor:
    return ops.conv3x3(x, module, residual)


def upsample(x: Tensor, module: nn.Module, residual: Tensor) -> Tensor:
    return ops.upsample_conv(x, module) + residual.sum() * 0


def trainable(num_in: int, num_out: int) -> Any:
    return conv(num_in, num_out).requires_grad_().train()


def gradients(run: Callable[..., Tensor], x: Tensor, module: Any, residual: Tensor, direction: Tensor) -> list[Tensor]:
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    return list(torch.autograd.grad(run(x, module, residual), [x, module.weight, module.bias, residual], direction))


@pytest.mark.parametrize("run", [convolve, upsample])
@pytest.mark.parametrize(("num_in", "num_out"), [(32, 32), (16, 64)])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_gradients_equal_the_references(
    run: Callable[..., Tensor], num_in: int, num_out: int, height: int, width: int
) -> None:
    module, scale = trainable(num_in, num_out), 2 if run is upsample else 1
    x, residual = draw(2, num_in, height, width), draw(2, num_out, height, width, seed=1)
    direction = draw(2, num_out, height * scale, width * scale, seed=2)

    ours = gradients(run, x, module, residual, direction)
    theirs = gradients(run, x.double(), wide(module), residual.double(), direction.double())

    assert max(error(*pair) for pair in zip(ours[:3], theirs[:3], strict=True)) < BOUND
    assert torch.equal(ours[3].double(), theirs[3])


@pytest.mark.parametrize("through", ["x", "weight"])
def test_conv3x3_has_a_second_derivative(through: str) -> None:
    module = trainable(32, 32)

    def second(x: Tensor, module: Any) -> list[Tensor]:
        x = x.clone().requires_grad_()
        inner = x if through == "x" else module.weight
        (first,) = torch.autograd.grad(ops.conv3x3(x, module).pow(3).sum(), inner, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, module.weight, module.bias]))

    ours, theirs = second(draw(1, 32, 16, 17), module), second(draw(1, 32, 16, 17).double(), wide(module))

    assert max(error(*pair) for pair in zip(ours, theirs, strict=True)) < BOUND  # worst seen 4e-6


def test_conv3x3_with_frozen_weights_has_the_gradient_of_x() -> None:
    module, x = conv(32, 32), draw(1, 32, 16, 16)
    plain, exact = x.clone().requires_grad_(), x.double().requires_grad_()

    ops.conv3x3(plain, module).square().sum().backward()
    wide(module)(exact).square().sum().backward()

    assert plain.grad is not None
    assert exact.grad is not None
    assert error(plain.grad, exact.grad) < BOUND
    assert module.weight.grad is None


@pytest.mark.parametrize("run", [convolve, upsample])
def test_x_without_grad_leaves_the_weights_gradient(run: Callable[..., Tensor]) -> None:
    module, x, residual = trainable(32, 32), draw(1, 32, 16, 16), torch.zeros(1, 32, 16, 16)
    exact = wide(module)

    run(x, module, residual).square().sum().backward()
    run(x.double(), exact, residual.double()).square().sum().backward()

    assert error(module.weight.grad, exact.weight.grad) < BOUND  # type: ignore[arg-type]


def test_conv3x3_passes_a_residuals_gradient_where_nothing_else_has_one() -> None:
    residual = draw(1, 32, 16, 16).requires_grad_()

    ops.conv3x3(draw(1, 32, 16, 16), conv(32, 32), residual).sum().backward()

    assert residual.grad is not None
    assert torch.equal(residual.grad, torch.ones_like(residual))


def test_gradients_survive_a_second_forward() -> None:
    module, x, other = trainable(32, 32), draw(1, 32, 16, 16), draw(1, 32, 16, 16, seed=9)
    (alone,) = torch.autograd.grad(ops.conv3x3(x, module).square().sum(), module.weight)

    first = ops.conv3x3(x, module).square().sum()
    ops.conv3x3(other, module).square().sum()
    (after,) = torch.autograd.grad(first, module.weight)

    assert torch.equal(after, alone)


def test_gradients_of_a_model_survive_a_second_forward() -> None:
    vae, x = narrow_vae().train(), draw(1, 3, 16, 16)
    weight = vae.decoder.up_blocks[0].resnets[0].conv1.weight
    (alone,) = torch.autograd.grad(vae(x).sample.square().sum(), weight)

    first = vae(x).sample.square().sum()
    vae(-x)
    (after,) = torch.autograd.grad(first, weight)

    assert torch.equal(after, alone)


def test_conv3x3_backward_notices_a_weight_changed_in_between() -> None:
    module, x = trainable(32, 32), draw(1, 32, 16, 16).requires_grad_()
    loss = ops.conv3x3(x, module).sum()
    with torch.no_grad():
        module.weight.mul_(2)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_hooks_run() -> None:
    module, seen = trainable(32, 32), []
    module.register_full_backward_hook(lambda *_: seen.append("called"))

    ops.conv3x3(draw(1, 32, 16, 16).requires_grad_(), module).sum().backward()

    assert seen == ["called"]


def test_training_gradients_of_a_model_equal_the_references() -> None:
    vae, x = narrow_vae().train(), draw(2, 3, 32, 36)

    def run() -> list[Tensor]:
        vae.zero_grad()
        recon = vae(x).sample
        F.mse_loss(recon, x).backward()
        return [weight.grad for weight in vae.parameters() if weight.grad is not None]

    ours = run()
    with dispatch.reference():
        theirs = run()

    # Against fp32, whose own noise dominates where a gradient is nearly zero: of the largest of all gradients.
    largest = max(float(grad.abs().max()) for grad in theirs)
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-4 * largest  # worst seen 5e-6
