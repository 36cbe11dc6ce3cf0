"""Attention in pieces, as on a GPU, and what a plan says of it."""

import pytest
import torch
from ops_cases import draw, error
from torch import Tensor

from sd_vae.banded.planning import PeakMemory
from sd_vae.ops import attention, operations
from sd_vae.ops.dispatch import planned_for


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v


def q_k_v(num_positions: int) -> list[Tensor]:
    return [draw(2, 1, num_positions, 32, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("num_positions", [1, 7, 64])
def test_attention_equals_fp64(num_positions: int) -> None:
    found = attention(*q_k_v(num_positions))

    assert error(found, exact(*q_k_v(num_positions))) < 2e-6  # worst seen 3e-7


@pytest.mark.parametrize("count", [2, 3, 7, 64])
def test_attention_in_pieces_sees_every_key(count: int) -> None:
    q, k, v = q_k_v(64)

    found = operations._attend_in_pieces(q, k, v, count)

    assert error(found, exact(q, k, v)) < 2e-6  # worst seen 3e-7


def planned_bytes(device: str, num_positions: int) -> int:
    q = torch.empty(1, 1, num_positions, 512, device="meta", dtype=torch.bfloat16)
    with PeakMemory([q]) as memory, planned_for(device):
        attention(q, q, q)
    return memory.peak_bytes


@pytest.mark.parametrize(("num_positions", "pieces"), [(4096, 1), (65536, 4)])
def test_plan_of_attention_on_a_gpu_holds_the_scores_of_a_piece(num_positions: int, pieces: int) -> None:
    result = 2 * 512 * num_positions
    scores = 2 * num_positions**2 // pieces

    assert planned_bytes("cuda", num_positions) == scores + result
    assert scores <= operations.MAX_SCORE_BYTES
    assert planned_bytes("cpu", num_positions) == result
