"""Decoding many parameters at once accepts exactly what decoding one by one accepts, and gives the same bits."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shira_diffusers.formats.decoding
from shira_diffusers import AdapterFormatError, SparseDelta
from shira_diffusers.formats.decoding import Coded, decode_parts, group_names, strictly
from shira_diffusers.formats.gap_codec import ESCAPES, GAP_DTYPES, decode_many, encode_gaps, fits_int32
from shira_diffusers.library.gaps_device import decode_many_on_device
from tests import reference


def part(indices: list[int], shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Coded:
    values = torch.arange(1, len(indices) + 1).to(dtype)
    return Coded(encode_gaps(torch.tensor(indices, dtype=torch.int64)), values, shape)


def random_parts(number: int, count: int, numel: int, seed: int = 0) -> dict[str, Coded]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(numel, generator=generator)[:count].sort().values for _ in range(number)]
    return {f"w{k:02}": Coded(encode_gaps(at), torch.randn(count).half(), (numel,)) for k, at in enumerate(drawn)}


def same(one: SparseDelta | AdapterFormatError, other: SparseDelta | AdapterFormatError) -> bool:
    return str(one) == str(other) if isinstance(one, AdapterFormatError) else one == other


element = {
    torch.uint8: st.sampled_from([0, 1, 254, 255]) | st.integers(0, 255),
    torch.uint16: st.sampled_from([0, 7, 65534, 65535]) | st.integers(0, 65535),
    torch.int32: st.sampled_from([*range(40), *range(10), -1, -2, 2**31 - 1]),
}


@st.composite
def coded_parts(draw: st.DrawFn, dtype: torch.dtype) -> Coded:
    """Mostly intact gaps, sometimes any; counts, sizes and values that mostly fit."""
    elements = draw(st.lists(element[dtype], min_size=1, max_size=12))
    top = ESCAPES.get(dtype)
    if top is not None and draw(st.integers(0, 4)):
        elements.append(3)  # finishes an escape
    indices = reference.indices_of_gaps(elements, top)
    count = max(1, len(indices) + draw(st.sampled_from([0] * 8 + [1, -1])))
    values = torch.ones(count)
    if not draw(st.integers(0, 9)):
        values[-1] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    reach = max(1, (indices or [0])[-1] + 1)
    return Coded(torch.tensor(elements).to(dtype), values, (min(2**31 - 1, reach + draw(st.integers(-1, 2))),))


@pytest.mark.parametrize("dtype", GAP_DTYPES)
def test_a_group_is_decoded_as_its_parts_would_be_alone(dtype: torch.dtype) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(coded_parts(dtype), min_size=1, max_size=4))
    def check(group: list[Coded]) -> None:
        parts = {f"w{number}": one for number, one in enumerate(group)}
        decoded = decode_parts(parts)
        assert decoded.keys() == parts.keys()
        assert all(same(decoded[name], strictly(one)) for name, one in parts.items())

    check()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(element[torch.uint8], min_size=1, max_size=6), min_size=1, max_size=3), st.data())
def test_any_bytes_are_told_apart(elements: list[list[int]], data: st.DataObject) -> None:
    """``decode_many`` says yes exactly where every weight's gaps are finished, in range and of the right count."""
    indices = [reference.indices_of_gaps(each, 255) for each in elements]
    counts = [max(1, len(own) + data.draw(st.integers(-1, 1))) for own in indices]
    numels = [max(0, own[-1] + data.draw(st.integers(0, 2))) if own else 5 for own in indices]
    out = [torch.zeros(count, dtype=torch.int32).numpy() for count in counts]
    right = all(
        each[-1] != 255 and own[-1] < numel and len(own) == count
        for each, own, numel, count in zip(elements, indices, numels, counts, strict=True)
    )
    assert decode_many([torch.tensor(each, dtype=torch.uint8) for each in elements], counts, numels, out) is right
    assert not right or [own.tolist() for own in out] == indices


@pytest.mark.parametrize("dtype", GAP_DTYPES)
def test_accelerators_tell_the_same_bytes_apart(dtype: torch.dtype) -> None:
    """The decoder for accelerators, here on a CPU: the same yes, the same no, the same indices."""

    @settings(max_examples=200, deadline=None)
    @given(st.lists(coded_parts(dtype), min_size=1, max_size=4))
    def check(group: list[Coded]) -> None:
        lengths, counts = [one.gaps.numel() for one in group], [one.values.numel() for one in group]
        numels = [one.shape[0] for one in group]
        out = [torch.zeros(count, dtype=torch.int32).numpy() for count in counts]
        right = decode_many([one.gaps for one in group], counts, numels, out)
        raw = torch.cat([one.gaps.view(torch.int16) if dtype == torch.uint16 else one.gaps for one in group])
        found = decode_many_on_device(raw, dtype, lengths, counts, torch.tensor([lengths, counts, numels]))
        assert bool(found.good) is right and found.indices.dtype == torch.int32
        assert not right or [at.tolist() for at in found.indices.split(counts)] == [own.tolist() for own in out]

    check()


@pytest.mark.parametrize("elements", [[[3, 255], [1]], [[1], [3, 255]]])
def test_an_unfinished_gap_in_a_wide_weight_is_seen(elements: list[list[int]]) -> None:
    coded = [torch.tensor(each, dtype=torch.uint8) for each in elements]
    out = [torch.zeros(1, dtype=torch.int32).numpy() for _ in coded]
    assert not decode_many(coded, [1, 1], [10_000] * 2, out)
    sizes = torch.tensor([[len(each) for each in elements], [1, 1], [10_000] * 2])
    assert not decode_many_on_device(torch.cat(coded), torch.uint8, sizes[0].tolist(), [1, 1], sizes).good


def test_intact_parameters_are_all_decoded_in_groups(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(shira_diffusers.formats.decoding, "strictly", lambda *_: pytest.fail("one by one"))
    wide = [0, 3, 70_000, 2**31 - 2]
    parts = {"a": part([0, 299, 300], (600, 1), dtype), "b": part([5], (6,), dtype), "c": part(wide, (2**31 - 1,))}
    decoded = decode_parts(parts)
    assert decoded["a"] == SparseDelta(torch.tensor([0, 299, 300]), torch.tensor([1, 2, 3]).to(dtype), (600, 1))
    assert decoded["c"].indices.tolist() == wide


def test_parameters_of_every_kind_side_by_side() -> None:
    """Empty ones, those beyond int32, of other dtypes and on no CPU go one by one, beside groups."""
    huge = [0, 2**33]
    parts = {
        "a": part([1, 2], (4,)),
        "empty": Coded(torch.empty(0, dtype=torch.uint8), torch.empty(0), (3, 0)),
        "huge": part(huge, (2**17, 2**17)),
        "double": Coded(torch.tensor([1], dtype=torch.uint8), torch.ones(1).double(), (4,)),
        "wide": Coded(torch.tensor([1, 300], dtype=torch.uint16), torch.ones(2), (400,)),
    }
    decoded = decode_parts(parts)
    assert decoded["huge"].indices.dtype == torch.int64 and decoded["huge"].indices.tolist() == huge
    assert decoded["empty"].nnz == 0
    assert decoded["wide"].indices.tolist() == [1, 302]
    assert "expected float32, float16 or bfloat16" in str(decoded["double"])
    assert all(same(decoded[name], strictly(one)) for name, one in parts.items())


def test_groups_of_a_large_adapter_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shira_diffusers.formats.decoding, "_GROUP", 4000)
    monkeypatch.setattr(shira_diffusers.formats.decoding, "_THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    parts = random_parts(30, 1000, 100_000)
    kinds = {name: (one.gaps.dtype, one.values.dtype, one.gaps.numel()) for name, one in parts.items()}
    assert len(list(group_names(kinds, 4000))) == 10
    broken = parts["w11"]
    parts["w11"] = broken._replace(values=broken.values[:-1])
    decoded = decode_parts(parts)
    assert [name for name, one in decoded.items() if isinstance(one, AdapterFormatError)] == ["w11"]
    assert all(same(decoded[name], strictly(one)) for name, one in parts.items())


def test_counts_that_are_wrong_one_by_one_but_right_in_all() -> None:
    one, two = part([1, 2], (9,)), part([3, 300], (400,))  # the second has three elements
    decoded = decode_parts({"a": one._replace(values=torch.ones(1)), "b": two._replace(values=torch.ones(3))})
    assert ["one value per index" in str(error) for error in decoded.values()] == [True, True]


def test_sums_that_could_overflow_are_taken_in_int64() -> None:
    assert fits_int32(torch.uint8, 2**31 // 255) and not fits_int32(torch.uint8, 2**31 // 255 + 1)
    assert not fits_int32(torch.int32, 1)
    part_ = Coded(torch.full((40_000,), 65534, dtype=torch.int64).to(torch.uint16), torch.ones(40_000), (2**31 - 1,))
    assert "out of range: up to 2621399999" in str(decode_parts({"a": part_})["a"])


def test_copied_values_hold_nothing_of_their_source(dtype: torch.dtype) -> None:
    source = part([0, 7, 9], (10,), dtype)
    kept, copied = (decode_parts({"a": source}, copy=copy)["a"] for copy in (False, True))
    assert kept == copied
    assert kept.values.data_ptr() == source.values.data_ptr() != copied.values.data_ptr()


def test_a_pickle_holds_one_parameter_and_not_all() -> None:
    decoded = decode_parts(random_parts(20, 500, 50_000))
    one = decoded["w03"]
    assert pickle.loads(pickle.dumps(one)) == one
    assert len(pickle.dumps(one)) < 2 * one.nbytes
    shared = torch.arange(10_000, dtype=torch.int32)
    assert len(pickle.dumps(SparseDelta(shared[:5], torch.ones(5), (10,)))) < 2000
