"""Muon: weight matrices move by orthogonalised momentum, everything else by AdamW.

A convolution's gradient is dominated by a few directions, and AdamW follows them. Muon replaces the momentum of each
matrix by the nearest matrix whose directions all have the same length, so that rare ones are learned as fast.

PyTorch's own `torch.optim.Muon` takes matrices only, no convolutions, and iterates in bfloat16, which costs four times
as much as float32 on a CPU without bfloat16 arithmetic.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/; the scale of an update is that of Liu et al., arXiv 2502.16982, section 2.2,
which makes AdamW's learning rates fit.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

__all__ = ["Muon", "orthogonalise"]

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen for its slope at 0: singular values need not become exactly 1."""
NUM_ROUNDS = 5
UPDATE_RMS = 0.2
"""Root mean square of an update over the learning rate, about that of AdamW."""
MIN_SIDE = 8
"""Matrices of fewer rows or columns have too few directions to balance; AdamW moves them."""


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return a matrix (M, N) with the singular vectors of the given one and singular values of about 1.

    They come to lie between 0.65 and 1.21, except those below a hundredth of the matrix's norm. Computed in bfloat16
    on a GPU and in float32 on a CPU, returned in the matrix's own dtype.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(NUM_ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)


class Muon(AdamW):
    """AdamW whose weight matrices move by orthogonalised momentum instead; its arguments are AdamW's.

    A matrix is a parameter of two or more dimensions, its first by all others, if neither side is below 8. An update's
    root mean square is 0.2 of the learning rate. Weight decay is decoupled, as in AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the matrices, then everything else; a matrix's gradient is dropped once it is used.

        Args:
            closure: Computes the loss and its gradients, called once; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and _is_matrix(parameter):
                    self._move(parameter, parameter.grad, group["lr"], group["weight_decay"])
                    parameter.grad = None
        super().step()
        return loss

    def _move(self, parameter: nn.Parameter, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # AdamW looks for it in every state that it reads back
        momentum = state["momentum"]
        momentum.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)
        update = orthogonalise(ahead.flatten(1)).reshape(ahead.shape)
        scale = UPDATE_RMS * math.sqrt(max(ahead.shape[0], ahead[0].numel()))
        parameter.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * scale)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= MIN_SIDE
