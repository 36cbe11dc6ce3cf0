"""A fixture for the tests of the compiled operations."""

import pytest

from sd_vae.ops import dispatch


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run on maps of any size, also where they gain nothing."""
    for name in ("MIN_PIXELS", "MIN_FLOPS", "MIN_FLOPS_IN_TRAINING"):
        monkeypatch.setattr(dispatch, name, 0)
