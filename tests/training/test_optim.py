"""Which optimizer a config names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sd_vae.muon import Muon
from training.config import OptimConfig
from training.optim import build_optimizer


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("muon", Muon)])
def test_the_config_names_the_optimizer(name: Any, kind: Callable[..., Any]) -> None:
    matrix, bias = nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(2))

    optimizer = build_optimizer([matrix], OptimConfig(name=name, weight_decay=0.1), undecayed=[bias])

    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
