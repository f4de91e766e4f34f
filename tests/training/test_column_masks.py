"""Masks of columns and a diagonal: seen for what they are, and trained without a dense gradient."""

import pytest
import torch
from torch import Tensor, nn

from shira_diffusers import ShiraAdapter, SparseDelta, build_masks
from shira_diffusers.training.gradient_taps import Columns, find_columns

SHAPES = [(32, 32), (24, 64), (64, 24), (1, 40), (40, 1)]


def struct_mask(shape: tuple[int, int], density: float = 0.12, seed: int = 0, avoid: tuple[Tensor, ...] = ()) -> Tensor:
    taken = [ShiraAdapter({"weight": SparseDelta(m, torch.ones(m.numel()), shape)}) for m in avoid]
    return build_masks(nn.Linear(*reversed(shape)), "struct", density, ["weight"], seed=seed, avoid=taken)["weight"]


def assert_gradient_is_the_dense_one(found: Columns, mask: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, outgoing = torch.randn(50, shape[1]).to(dtype), torch.randn(50, shape[0]).to(dtype)
    products = torch.empty(found.size, dtype=dtype)
    found.products(outgoing, found.select(x), products)
    got = products[found.order.long()]
    expected = (outgoing.double().t() @ x.double()).flatten()[mask]
    torch.testing.assert_close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_struct_masks_are_seen_and_have_the_dense_gradient(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    mask = struct_mask(shape)
    found = find_columns(mask.int(), shape)
    if 1 in shape:  # as many columns as entries: the dense gradient is as good
        assert found is None or found.columns.numel() <= 1
        return
    assert found is not None
    assert found.columns.numel() * 4 <= shape[1]
    assert_gradient_is_the_dense_one(found, mask, shape, dtype)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_a_shifted_diagonal_and_broken_columns_are_seen(shape: tuple[int, int]) -> None:
    """As ``avoid`` leaves them."""
    torch.manual_seed(2)
    first = struct_mask(shape)
    mask = struct_mask(shape, seed=1, avoid=(first,))
    found = find_columns(mask, shape)
    assert found is not None
    assert found.shift != 0
    assert_gradient_is_the_dense_one(found, mask, shape, torch.float32)


def test_columns_alone_and_a_diagonal_alone_are_seen() -> None:
    columns = torch.arange(20).view(4, 5)[:, 2]
    found = find_columns(columns, (4, 5))
    assert found is not None
    assert (found.columns.tolist(), found.diagonal) == ([2], 0)
    assert_gradient_is_the_dense_one(found, columns, (4, 5), torch.float32)
    across = torch.tensor([0, 6, 12, 18])
    found = find_columns(across, (4, 5))
    assert found is not None
    assert (found.columns.numel(), found.diagonal, found.shift) == (0, 4, 0)
    assert_gradient_is_the_dense_one(found, across, (4, 5), torch.float32)


@pytest.mark.parametrize("family", ["rand", "wm", "struct_rows", "block"])
def test_other_masks_are_not(family: str) -> None:
    mask = build_masks(nn.Linear(64, 48), family, 0.05, ["weight"])["weight"]
    assert find_columns(mask, (48, 64)) is None


def test_an_empty_mask_and_one_entry_off_the_diagonal_are_not() -> None:
    assert find_columns(torch.empty(0, dtype=torch.int32), (4, 5)) is None
    assert find_columns(torch.tensor([0, 6, 13]), (4, 5)) is None
    assert find_columns(torch.tensor([6, 17]), (5, 4)) is None, "below the square there is no diagonal"


def test_few_inputs_are_few() -> None:
    wide, square = find_columns(struct_mask((24, 64)), (24, 64)), find_columns(struct_mask((32, 32)), (32, 32))
    assert wide is not None
    assert square is not None
    assert (wide.few(64), square.few(32)) == (True, False)
    assert sum(part.shape[1] for part in wide.select(torch.randn(3, 64))) <= 32
