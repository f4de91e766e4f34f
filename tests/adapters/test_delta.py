"""SparseDelta: what is accepted, and what is refused with which words."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from shira_diffusers import AdapterFormatError, SparseDelta
from shira_diffusers.adapters.delta import check_indices, index_dtype
from tests import reference


def delta(indices: list[int], values: list[float], shape: tuple[int, ...] = (2, 3)) -> SparseDelta:
    return SparseDelta(torch.tensor(indices, dtype=torch.int64), torch.tensor(values), shape)


def test_what_it_holds() -> None:
    one = delta([0, 4], [1.0, -2.0])
    assert (one.numel, one.nnz, one.density, one.nbytes) == (6, 2, 2 / 6, 16)
    assert one.indices.dtype == torch.int32
    assert one.to_dense().tolist() == [[1, 0, 0], [0, -2, 0]]
    assert torch.equal(one.to_dense(), reference.dense(one.indices, one.values, one.shape))


def test_the_dense_delta_of_a_convolution_is_float32(dtype: torch.dtype) -> None:
    one = SparseDelta(torch.tensor([0, 17, 35]), torch.tensor([1.5, 2.0, -3.0], dtype=dtype), (2, 2, 3, 3))
    assert one.to_dense().dtype == torch.float32
    assert torch.equal(one.to_dense(), reference.dense(one.indices, one.values, one.shape))
    assert one.values.dtype == dtype
    assert one.astype(torch.float32).values.dtype == torch.float32


@pytest.mark.parametrize(
    ("indices", "values", "shape", "message"),
    [
        ([0, 6], [1.0, 1.0], (2, 3), "out of range: 0 to 6, expected 0 to 5"),
        ([-1, 2], [1.0, 1.0], (2, 3), "out of range: -1 to 2"),
        ([3, 1], [1.0, 1.0], (2, 3), "unsorted at position 1: 3 then 1"),
        ([1, 1], [1.0, 1.0], (2, 3), "duplicate at position 1: 1 then 1"),
        ([1, 2], [1.0], (2, 3), "one value per index"),
        ([1, 2], [1.0, torch.nan], (2, 3), "1 of 2 values is NaN or infinite"),
        ([1, 2], [-torch.inf, torch.inf], (2, 3), "2 of 2 values"),
        ([0], [1.0], (2, 0), "out of range"),
        ([0], [1.0], (2, -3), "not a tuple of sizes"),
        ([0], [1.0], (2.0, 3), "not a tuple of sizes"),
    ],
)
def test_what_is_refused(indices: list[int], values: list[float], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(AdapterFormatError, match=message):
        delta(indices, values, shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_values_of_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(AdapterFormatError, match="expected float32, float16 or bfloat16"):
        SparseDelta(torch.tensor([1]), torch.ones(1).to(dtype), (2, 3))


def test_indices_of_another_dtype_or_shape() -> None:
    with pytest.raises(AdapterFormatError, match="expected int32 or int64"):
        SparseDelta(torch.tensor([1.0]), torch.ones(1), (2, 3))
    with pytest.raises(AdapterFormatError, match=r"expected \(nnz,\)"):
        SparseDelta(torch.tensor([[1, 2]]), torch.ones(1, 2), (2, 3))


def test_arrays_are_no_tensors() -> None:
    for indices, values, what in ((np.array([1]), torch.ones(1), "indices"), (torch.tensor([1]), np.ones(1), "values")):
        with pytest.raises(AdapterFormatError, match=f"{what} are ndarray, expected a tensor"):
            SparseDelta(indices, values, (2, 3))


def test_an_empty_delta() -> None:
    empty = delta([], [])
    assert (empty.nnz, empty.density) == (0, 0.0)
    assert not empty.to_dense().any()
    assert SparseDelta(torch.empty(0, dtype=torch.int64), torch.empty(0), (0, 3)).density == 0.0


def test_indices_are_int32_up_to_the_largest_int32() -> None:
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64
    huge = SparseDelta(torch.tensor([0, 2**33]), torch.ones(2), (2**17, 2**17))
    assert huge.indices.dtype == torch.int64
    assert check_indices(torch.tensor([2**33]), 2**33) is not None


def test_equality_is_exact() -> None:
    one = delta([0, 4], [1.0, -2.0])
    assert one == delta([0, 4], [1.0, -2.0]) == copy.deepcopy(one) == pickle.loads(pickle.dumps(one))
    assert one != delta([0, 5], [1.0, -2.0])
    assert one != delta([0, 4], [1.0, -2.5])
    assert one != delta([0, 4], [1.0, -2.0], (3, 2))
    assert one != one.astype(torch.float16)
    assert one != "delta"
    with pytest.raises(TypeError):
        hash(one)


def test_it_is_frozen() -> None:
    with pytest.raises(AttributeError):
        delta([0], [1.0]).shape = (6,)


def test_rounding_that_overflows_is_refused() -> None:
    with pytest.raises(AdapterFormatError, match="infinite"):
        delta([0], [1e6]).astype(torch.float16)


@pytest.mark.parametrize("change", [lambda t: t.to("meta"), lambda t: t.to_sparse()], ids=["meta", "sparse"])
def test_tensors_without_plain_values_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    indices, values = torch.tensor([0, 2]), torch.ones(2)
    for pair in ((change(indices), values), (indices, change(values))):
        with pytest.raises(AdapterFormatError, match="expected dense tensors that hold values"):
            SparseDelta(*pair, (2, 2))
