"""Decoding all weights at once accepts exactly what decoding one by one accepts, and gives the same bits, anywhere."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira_diffusers import ShiraAdapter, SparseDelta, load_adapter, save_adapter
from shira_diffusers.formats import block as block_module
from shira_diffusers.formats import gap_codec, gpu_decoder
from shira_diffusers.formats.block import RUN, Block, Weight
from shira_diffusers.formats.gap_codec import ESCAPES, encode_many
from shira_diffusers.formats.gpu_decoder import DeviceDecoder, decode_gaps_on, raw_gaps
from shira_diffusers.formats.safetensors_bytes import Raw
from shira_diffusers.formats.shira_file import _running_sum, raw_of, tensor_of
from tests import reference
from tests.formats import golden

DTYPES = ("uint8", "uint16", "int32")
element = {
    "uint8": st.sampled_from([0, 1, 254, 255]) | st.integers(0, 255),
    "uint16": st.sampled_from([0, 7, 65534, 65535]) | st.integers(0, 65535),
    "int32": st.sampled_from([*range(40), *range(10), -1, -2, 2**31 - 1, 2**31 - 2]),
}


def block_of(elements: list[list[int]], dtype: str, counts: list[int], limits: list[int], run: int = 1) -> Block:
    """Of weights with these coded elements, so many positions, and so many places for them."""
    weights = tuple(
        Weight(f"w{k}", (limit * run,), count * run, "F32")
        for k, (count, limit) in enumerate(zip(counts, limits, strict=True))
    )
    coded = np.array([each for own in elements for each in own], np.int64).astype(dtype)
    return Block(weights, Raw("F32", np.ones(sum(counts) * run, np.float32)), coded, run)


@st.composite
def blocks(draw: st.DrawFn, dtype: str) -> Block:
    """Mostly intact gaps, sometimes any; counts and sizes that mostly fit; weights without entries too."""
    top, elements, counts, limits = ESCAPES.get(dtype), [], [], []
    for _ in range(draw(st.integers(1, 4))):
        own = draw(st.lists(element[dtype], max_size=12))
        if top is not None and own and draw(st.integers(0, 4)):
            own.append(3)  # finishes an escape
        indices = reference.indices_of_gaps(own, top)
        elements.append(own)
        counts.append(max(0, len(indices) + draw(st.sampled_from([0] * 12 + [1, -1]))))
        reach = (indices or [-1])[-1] + 1
        limits.append(min((2**31 - 1) // RUN, max(0, reach + draw(st.sampled_from([0, 0, 1, 2, -1])))))
    return block_of(elements, dtype, counts, limits, draw(st.sampled_from([1, RUN])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_decoders_tell_the_same_blocks_apart(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's sums and torch's, in pieces of every size, and the decoder for accelerators, here on a CPU."""
    chunk = {name: 5 for name in DTYPES}

    @settings(max_examples=300, deadline=None)
    @given(blocks(dtype), st.sampled_from([1, 3, 2**23]))
    def check(block: Block, piece: int) -> None:
        monkeypatch.setattr(gpu_decoder, "_PIECE", piece)
        problems = block.problems()
        wide, small = block.decode(), block.decode(running_sum=_running_sum)
        with monkeypatch.context() as patch:
            patch.setattr(gap_codec, "_CHUNKS", chunk)
            patch.setattr(gap_codec, "_THREADED", 0)
            cut = block.decode(threads=3)
        on_device, good = decode_gaps_on(tensor_of(raw_gaps(block)), block)
        assert bool(good) is (not problems)
        if problems:
            assert wide is small is cut is None
            return
        expected = [at.tolist() for at in block._decode_each()]
        for found in (wide, small, cut, on_device.split([weight.nnz for weight in block.weights])):
            assert [at.tolist() for at in found] == expected
            assert all(str(at.dtype).removeprefix("torch.") == "int32" for at in found)

    check()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(element["uint8"], min_size=1, max_size=6), min_size=1, max_size=3), st.data())
def test_any_bytes_are_told_apart(elements: list[list[int]], data: st.DataObject) -> None:
    """A block is intact exactly where all indices are there, the last gap is finished and each weight's in range."""
    whole = [each for own in elements for each in own]
    ends = reference.indices_of_gaps(whole, 255)
    counts = [sum(each != 255 for each in own) for own in elements]
    counts[0] = max(0, counts[0] + data.draw(st.sampled_from([0, 0, 0, 1, -1])))
    starts = [sum(counts[:k]) for k in range(len(counts))]
    limits = [data.draw(st.integers(0, 2000)) for _ in counts]
    right = whole[-1] != 255 and len(ends) == sum(counts)
    expected = []
    for start, count, limit in zip(starts, counts, limits, strict=True):
        before = ends[start - 1] if start and right else -1
        own = [at - before - 1 for at in ends[start : start + count]]
        right = right and (not own or own[-1] < limit)
        expected.append(own)
    found = block_of(elements, "uint8", counts, limits).decode()
    assert (found is not None) is right
    assert found is None or [own.tolist() for own in found] == expected


@pytest.mark.parametrize("gaps", [[2**31 - 1, 2**31 - 2], [2**31 - 1] * 2, [2**31 - 1] * 4, [2**31 - 2, 0, 2**31 - 2]])
def test_sums_that_go_round_are_refused(gaps: list[int]) -> None:
    """Of int32 gaps that come back to where they are in range."""
    block = block_of([gaps], "int32", [len(gaps)], [2**31 - 1])
    assert block.decode() is None and block.problems()
    assert not decode_gaps_on(tensor_of(raw_gaps(block)), block)[1]


def test_sums_over_all_weights_may_be_any_number() -> None:
    """Only those of one weight fit int32."""
    block = block_of([[2**31 - 3, 0]] * 9, "int32", [2] * 9, [2**31 - 1] * 9)
    on_device, good = decode_gaps_on(tensor_of(raw_gaps(block)), block)
    assert good and on_device.tolist() == [2**31 - 3, 2**31 - 2] * 9
    assert [at.tolist() for at in block.decode() or []] == [[2**31 - 3, 2**31 - 2]] * 9


def test_a_large_adapter_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    indices = [np.sort(generator.choice(300_000, 3000, replace=False)) for _ in range(40)]
    weights = tuple(Weight(f"w{k}", (300_000,), 3000, "F16") for k in range(40))
    block = Block(weights, Raw("F16", np.ones(120_000, np.float16)), encode_many(indices))
    monkeypatch.setattr(gap_codec, "_CHUNKS", {"uint8": 1000})
    monkeypatch.setattr(gap_codec, "_THREADED", 1)
    monkeypatch.setattr(block_module, "_PIECE", 1000)
    found = block.decode(threads=4)
    assert found is not None and all(np.array_equal(a, b) for a, b in zip(found, indices, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1, 499_999])
def test_one_value_that_is_no_number_is_found(bad: float, place: int, dtype: torch.dtype) -> None:
    values = torch.full((500_000,), -1.0).to(dtype)
    assert block_module.is_finite(raw_of(values))
    values[place] = bad
    assert not block_module.is_finite(raw_of(values)) and not block_module.is_finite(raw_of(values), threads=2)
    assert block_module.is_finite(
        raw_of(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, -0.0]).to(dtype))
    )


@pytest.mark.parametrize("make", [*golden.FORMAT_2.values()])
def test_deltas_hold_nothing_of_their_file(make: Callable[[], ShiraAdapter], tmp_path: pytest.TempPathFactory) -> None:
    """And a pickle holds one weight, not all that it lies beside."""
    loaded = load_adapter(save_adapter(make(), tmp_path))
    (tmp_path / "pytorch_shira_weights.safetensors").write_bytes(bytes(10))
    golden.assert_same(loaded, make())
    for delta in loaded.deltas.values():
        assert pickle.loads(pickle.dumps(delta)) == delta
        assert len(pickle.dumps(delta)) < 2 * delta.nbytes + 2000
    shared = torch.arange(10_000, dtype=torch.int32)
    assert len(pickle.dumps(SparseDelta(shared[:5], torch.ones(5), (10,)))) < 2000


def test_the_decoder_of_accelerators_gives_views_of_two_tensors(tmp_path: pytest.TempPathFactory) -> None:
    from shira_diffusers.formats.opened_adapter import open_adapter

    file = save_adapter(golden.plain(), tmp_path)
    adapter, held = open_adapter(file).decode_on(DeviceDecoder(torch.device("cpu")))
    assert adapter.deltas == load_adapter(file).deltas
    assert (
        len(held) == 2 and sum(tensor.nbytes for tensor in held) == adapter.nbytes == open_adapter(file).decoded_nbytes
    )
