"""Gradients that arrive weight by weight in one backward and are added up at its end."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shira_diffusers.training.gradient_buffer import GradientBuffer


class Pair:
    """Two weights of two entries each, all of them trained."""

    def __init__(self) -> None:
        self.flat = nn.Parameter(torch.zeros(4))
        self.buffer = GradientBuffer([2, 2], None, self.flat.device, self._receive)
        self.weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
        for number, weight in enumerate(self.weights):
            weight.register_post_accumulate_grad_hook(self._collect(number))

    def _collect(self, number: int) -> Callable[[Tensor], None]:
        def collect(weight: Tensor) -> None:
            dense, weight.grad = weight.grad, None
            assert dense is not None
            self.buffer.take(number, dense, torch.tensor([0, 1]))

        return collect

    def _receive(self, gradient: Tensor) -> None:
        self.flat.grad = gradient if self.flat.grad is None else self.flat.grad + gradient

    def both(self) -> Tensor:
        return (self.weights[0] * torch.tensor([1.0, 2.0])).sum() + (self.weights[1] * torch.tensor([3.0, 4.0])).sum()


def test_parts_of_two_dtypes_are_added_at_the_end_of_each_backward() -> None:
    pair = Pair()
    pair.both().backward()
    assert pair.flat.grad is not None
    assert pair.flat.grad.dtype == torch.float32
    assert pair.flat.grad.tolist() == [1, 2, 3, 4]
    pair.both().backward()
    assert pair.flat.grad.tolist() == [2, 4, 6, 8]


def test_a_part_that_does_not_come_counts_nothing() -> None:
    pair = Pair()
    pair.weights[1].sum().backward()
    assert pair.flat.grad is not None
    assert pair.flat.grad.tolist() == [0, 0, 1, 1]


def test_backward_inside_backward_loses_nothing() -> None:
    """Reentrant checkpoints run one for each segment; here both use the same weight."""
    pair = Pair()

    def segment(x: Tensor) -> Tensor:
        return x * pair.weights[0]

    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        x = checkpoint(segment, x, use_reentrant=True)
    (x.sum() + pair.weights[1].sum()).backward()
    assert pair.flat.grad is not None
    assert pair.flat.grad.tolist() == [2, 2, 1, 1]


def test_a_backward_that_failed_does_not_silence_the_next() -> None:
    pair = Pair()

    def fail(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    x = torch.ones(2, requires_grad=True)
    x.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        ((x * 1.0) * pair.weights[0]).sum().backward()
    pair.flat.grad = None
    pair.weights[1].sum().backward()
    assert pair.flat.grad is not None
    assert pair.flat.grad[2:].tolist() == [1, 1]


def test_gradients_for_another_parameter_are_left_alone() -> None:
    first, second = Pair(), Pair()
    (first.both() + 2 * second.both()).backward()
    assert first.flat.grad is not None
    assert second.flat.grad is not None
    assert (second.flat.grad / first.flat.grad).tolist() == [2, 2, 2, 2]


def test_entries_are_put_in_order() -> None:
    received: list[list[float]] = []
    buffer = GradientBuffer([3, 1], torch.tensor([2, 3, 0]), torch.device("cpu"), lambda g: received.append(g.tolist()))
    weight = nn.Parameter(torch.ones(3))
    weight.register_post_accumulate_grad_hook(lambda w: buffer.take(0, w.grad, torch.tensor([0, 1, 2])))
    (weight * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert received == [[3.0, 0.0, 1.0]]
