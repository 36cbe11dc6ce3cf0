"""Memory of one call: slabs that are taken and given back, areas that grow, nothing left at the end."""

import pytest
import torch

from sd_vae.ops.workspace import Workspace


def test_workspace_gives_a_slab_again() -> None:
    with Workspace(4096) as workspace:
        first = workspace.take((4, 8, 32), torch.float32)
        address = first.data_ptr()
        workspace.give(first)

        assert workspace.take((2, 8, 32), torch.float32).data_ptr() == address


def test_workspace_keeps_taken_bands_apart() -> None:
    with Workspace(4096) as workspace:
        first, second = (workspace.take((1024,), torch.float32).fill_(value) for value in (1, 2))

        assert (first.unique().item(), second.unique().item()) == (1, 2)


def test_workspace_refuses_a_band_larger_than_a_slab() -> None:
    with Workspace(4096) as workspace, pytest.raises(AssertionError, match="a band of 4100 bytes is larger"):
        workspace.take((1025,), torch.float32)


def test_workspace_grows_an_area() -> None:
    with Workspace(0) as workspace:
        small = workspace.scratch("left", (10,))

        assert workspace.scratch("left", (5,)).data_ptr() == small.data_ptr()
        assert workspace.scratch("left", (10_000,)).numel() == 10_000


def test_workspace_lets_go_at_its_end() -> None:
    with Workspace(4096) as workspace:
        workspace.give(workspace.take((4,), torch.float32))
        workspace.scratch("left", (10,))

    assert (workspace._free, workspace._slabs, workspace._areas) == ([], {}, {})
