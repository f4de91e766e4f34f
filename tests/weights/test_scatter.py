"""Gather and overwrite for every layout and dtype of a weight, bit for bit."""

import pytest
import torch
from torch import Tensor

from shira_diffusers.weights.scatter import flat_view, gather, is_dense, overwrite
from tests import tiny

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, CUDA])]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def big() -> Tensor:
    return torch.randn(12, 40, generator=torch.Generator().manual_seed(0))


LAYOUTS = {
    "contiguous": lambda: big(),
    "transposed": lambda: big().t(),
    "a slice of rows": lambda: big()[3:9],
    "a slice of columns": lambda: big()[:, 5:17],
    "every other row": lambda: big()[::2],
    "a convolution": lambda: big().view(6, 5, 4, 4),
    "channels_last": lambda: big().view(6, 5, 4, 4).to(memory_format=torch.channels_last),
    "channels_last of one channel": lambda: big().view(120, 1, 2, 2).to(memory_format=torch.channels_last),
    "permuted": lambda: big().view(3, 4, 10, 4).permute(2, 0, 3, 1),
    "one entry": lambda: big()[:1, :1],
    "a vector": lambda: big()[0],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_gather_and_overwrite(layout: object, dtype: torch.dtype, index: torch.dtype, device: str) -> None:
    plain = layout()
    weight = torch.empty_strided(plain.shape, plain.stride(), dtype=dtype, device=device).copy_(plain)
    assert weight.stride() == plain.stride()
    generator = torch.Generator().manual_seed(1)
    count = max(1, weight.numel() // 3)
    indices = torch.randperm(weight.numel(), generator=generator)[:count].sort().values.to(index)
    values = torch.randn(count, generator=generator).to(dtype)
    before = weight.cpu().contiguous().float().flatten()
    assert torch.equal(gather(weight, indices).cpu().float(), before[indices.long()])
    assert gather(weight, indices).dtype == dtype
    address = weight.data_ptr()
    overwrite(weight, indices, values)
    after = before.clone()
    after[indices.long()] = values.float()
    assert torch.equal(weight.cpu().contiguous().float().flatten(), after)
    assert weight.data_ptr() == address


def test_only_the_slice_is_written() -> None:
    whole = torch.zeros(12, 40)
    overwrite(whole[:, 5:17], torch.arange(12 * 12), torch.ones(144))
    assert whole[:, 5:17].all()
    assert whole.sum() == 144


def test_an_offset_addresses_a_row_major_part() -> None:
    queries, keys = torch.zeros(4, 6), torch.zeros(4, 6)
    whole = torch.cat([queries, keys])
    overwrite(whole, torch.tensor([0, 23], dtype=torch.int32), torch.tensor([1.0, 2.0]), offset=24)
    assert whole[4, 0] == 1
    assert whole[7, 5] == 2
    assert whole.sum() == 3


def test_bits_survive() -> None:
    """NaN payloads, signed zeros and subnormals, which arithmetic would lose."""
    bits = torch.tensor([0x7FC00001, -0x80000000, 1, 0x7F800000], dtype=torch.int64).to(torch.int32)
    weight = torch.zeros(2, 4)
    overwrite(weight, torch.tensor([0, 3, 4, 7]), bits.view(torch.float32))
    assert torch.equal(gather(weight, torch.tensor([0, 3, 4, 7])).view(torch.int32), bits)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    small = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    overwrite(small, torch.arange(256), every)
    assert tiny.same_bits(small.flatten(), every)


@pytest.mark.parametrize("inference", [True, False])
def test_parameters_and_inference_tensors(inference: bool) -> None:
    with torch.inference_mode(inference):
        weight = torch.nn.Parameter(torch.zeros(3, 3))
    overwrite(weight, torch.tensor([4]), torch.ones(1))
    assert weight[1, 1] == 1
    assert not gather(weight, torch.tensor([4])).requires_grad


def test_values_of_another_dtype_are_refused() -> None:
    weight = torch.zeros(3, 3)
    with pytest.raises(TypeError, match=r"cannot write torch\.float16 values into a torch\.float32 weight"):
        overwrite(weight, torch.tensor([4]), torch.ones(1).half())
    assert not weight.any()


def test_the_flat_view_is_the_weight_itself() -> None:
    weight = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    flat_view(weight).fill_(1)
    assert weight.all()


def test_dense_or_not() -> None:
    for layout in LAYOUTS.values():
        assert is_dense(layout())
    assert not is_dense(torch.zeros(1, 3).expand(4, 3))
    assert not is_dense(torch.zeros(10).as_strided((4, 4), (2, 1)))
    assert not is_dense(torch.zeros(0, 3))


def test_no_indices() -> None:
    weight = big()
    before = weight.clone()
    overwrite(weight, torch.empty(0, dtype=torch.int32), torch.empty(0))
    assert torch.equal(weight, before)
    assert gather(weight, torch.empty(0, dtype=torch.int32)).numel() == 0
