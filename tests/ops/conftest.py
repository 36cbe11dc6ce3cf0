"""Fixtures for the tests of the compiled operations."""

import pytest
import torch

from sd_vae.ops import dispatch, triton_norm


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run on maps of any size, also where they gain nothing."""
    for name in ("MIN_PIXELS", "MIN_FLOPS", "MIN_FLOPS_IN_TRAINING"):
        monkeypatch.setattr(dispatch, name, 0)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the Triton kernels run on is said to be here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(triton_norm, "_triton_is_installed", lambda: True)
