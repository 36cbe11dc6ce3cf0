"""What the operations do with the Triton kernels, on a CPU: the kernels are stood in for by PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from ops_cases import fake_map
from torch import nn

from sd_vae.ops import dispatch, operations, triton_norm


@pytest.fixture
def kernels(monkeypatch) -> dict[str, int]:
    """Count of launches; sums and norms in PyTorch, and dispatch as if x were on a GPU."""
    launches = {"add": 0, "norm": 0, "known": 0}
    triton = dispatch.Choice("triton", "as on a GPU")

    def add_with_statistics(h, residual):
        launches["add"] += 1
        total = h + residual
        return total, total.mean()

    def group_norm_silu(x, weight, bias, num_groups, eps, *, silu, statistics):
        launches["norm"] += 1
        assert silu
        if statistics is not None:
            launches["known"] += 1
            assert torch.equal(statistics, x.mean())
        return F.silu(F.group_norm(x, num_groups, weight, bias, eps))

    monkeypatch.setattr(triton_norm, "add_with_statistics", add_with_statistics)
    monkeypatch.setattr(triton_norm, "group_norm_silu", group_norm_silu)
    monkeypatch.setattr(dispatch, "choose_norm", lambda *_: triton)
    monkeypatch.setattr(dispatch, "choose_sum", lambda *_: triton)
    return launches


def test_norm_takes_the_statistics_of_the_sum_before_it(kernels) -> None:
    norm, conv = nn.GroupNorm(4, 8, eps=0.3), nn.Conv2d(8, 8, 3, padding=1)
    x, residual = torch.randn(2, 1, 8, 5, 5).unbind(0)

    total = operations.conv3x3(x, conv, residual=residual)
    result = operations.group_norm_silu(total, norm)

    expected = F.silu(norm(conv(x) + residual))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert kernels == {"add": 1, "norm": 1, "known": 1}


def test_norm_of_anything_else_takes_its_own_statistics(kernels) -> None:
    x = torch.randn(1, 8, 5, 5)

    operations.group_norm_silu(x, nn.GroupNorm(4, 8))

    assert kernels == {"add": 0, "norm": 1, "known": 0}


def test_norm_of_a_sum_that_was_changed_in_place_takes_its_own_statistics(kernels) -> None:
    x, residual = torch.randn(2, 1, 8, 5, 5).unbind(0)
    with torch.no_grad():
        total = operations.conv3x3(x, nn.Conv2d(8, 8, 3, padding=1), residual=residual)

        total.mul_(2)  # as a hook may
        operations.group_norm_silu(total, nn.GroupNorm(4, 8))

    assert kernels == {"add": 1, "norm": 1, "known": 0}


def test_sums_that_do_not_count_their_changes_bring_no_statistics(kernels) -> None:
    x, residual = torch.randn(2, 1, 8, 5, 5).unbind(0)

    with torch.inference_mode():
        total = operations.conv3x3(x, nn.Conv2d(8, 8, 3, padding=1), residual=residual)
        operations.group_norm_silu(total, nn.GroupNorm(4, 8))

    assert kernels == {"add": 1, "norm": 1, "known": 0}


def test_statistics_go_with_their_sum(kernels) -> None:
    total = operations.conv3x3(torch.randn(1, 8, 5, 5), nn.Conv2d(8, 8, 3, padding=1), residual=torch.randn(1, 8, 5, 5))
    assert total in operations._statistics_of_sums

    del total

    assert not operations._statistics_of_sums


@pytest.fixture
def _on_a_gpu(ampere, monkeypatch) -> None:
    """Maps that are stood in for are taken for real ones."""
    monkeypatch.setattr(dispatch, "opaque", lambda _: None)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("residual", "why"),
    [
        ({}, "on a GPU, channels_last, no gradients"),
        ({"dtype": torch.float32}, "the residual is torch.float32, h is torch.float16"),
        ({"format": torch.contiguous_format}, "x is not channels_last"),
    ],
)
@torch.no_grad()
def test_choose_sum_on_a_gpu_looks_at_both(residual, why: str) -> None:
    choice = dispatch.choose_sum(fake_map(**residual), fake_map())

    assert choice == dispatch.Choice("reference" if residual else "triton", why)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("changes", "grad", "why"),
    [
        ({}, False, "on a GPU, channels_last, no gradients"),
        ({}, True, "gradients are on, and the kernels have none"),
        ({"shape": (2, 10, 5, 7)}, False, "10 channels do not divide into 4 groups"),
    ],
)
def test_choose_norm_on_a_gpu_asks_the_kernels(changes, grad: bool, why: str) -> None:
    with torch.set_grad_enabled(grad):
        choice = dispatch.choose_norm(fake_map(**changes), nn.GroupNorm(4, 12), nn.SiLU())

    assert choice == dispatch.Choice("triton" if why.startswith("on a GPU") else "reference", why)


def test_sum_on_a_cpu_is_plain() -> None:
    x = torch.randn(1, 8, 5, 5)

    assert dispatch.choose_sum(x, x).why == "h is on cpu"
