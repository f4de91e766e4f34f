"""The file format: golden bytes, round trips, other writers' files, and every kind of damage."""

import hashlib
import json
import math
import os
import pickle
import re
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import shira_diffusers.atomic_write
from shira_diffusers import AdapterFormatError, ShiraAdapter, SparseDelta, load_adapter, save_adapter
from shira_diffusers.atomic_write import made_whole, write_atomically
from shira_diffusers.formats import adapter_file, gap_codec, safetensors_bytes
from shira_diffusers.formats.gpu_decoder import DeviceDecoder
from shira_diffusers.formats.inspect import inspect_adapter
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.formats.safetensors_bytes import Bytes, mapped, open_safetensors
from shira_diffusers.formats.shira_file import WEIGHTS_NAME, decode, encode, read_safetensors, serialize, tensor_of
from tests import reference, tiny
from tests.formats import golden

ROOT = Path(__file__).parents[2]
TOPS = {torch.uint8: 255, torch.uint16: 65535, torch.int32: None}


@pytest.fixture
def adapter() -> ShiraAdapter:
    return ShiraAdapter(
        {
            "unet.a.weight": SparseDelta(torch.tensor([0, 2, 259]), torch.tensor([1.0, -2.0, 0.5]).half(), (4, 65)),
            "unet.b.weight": SparseDelta(torch.tensor([5]), torch.tensor([0.25]).half(), (1, 2, 3, 1)),
        },
        {"base_model": "tiny", "density": "0.01"},
        {"unet.a.weight": torch.tensor([1.0, 2.0]).half()},
    )


def encode_gaps(indices: Tensor) -> Tensor:
    return torch.from_numpy(gap_codec.encode_gaps(indices.numpy()))


def decode_gaps(coded: Tensor, numel: int) -> Tensor:
    return torch.from_numpy(gap_codec.decode_gaps(coded.numpy(), numel))


def same(one: ShiraAdapter, other: ShiraAdapter) -> bool:
    return one.deltas == other.deltas and one.base_probes.keys() == other.base_probes.keys()


# -------------------------------------------------------------------- the bytes themselves


def parsed(content: bytes) -> tuple[dict[str, str], dict[str, tuple[str, list[int], str]]]:
    """The header's strings, and by key dtype, shape and bytes in hexadecimal digits."""
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.pop("__metadata__")
    parts = {k: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])].hex(" ")) for k, e in header.items()}
    return metadata, parts


EXAMPLE = ShiraAdapter(
    {
        "unet.a.weight": SparseDelta(torch.tensor([0, 2, 259]), torch.tensor([1.0, -2.0, 0.5]).half(), (4, 65)),
        "unet.b.weight": SparseDelta(torch.tensor([5]), torch.tensor([0.25]).half(), (1, 6)),
    },
    {"base_model": "tiny", "density": "0.01"},
    {"unet.a.weight": torch.tensor([1.0, 2.0]).half()},
)


def test_golden_bytes(tmp_path: Path) -> None:
    """The whole file, byte for byte, as docs/format.md lets another program write or read it."""
    content = save_adapter(EXAMPLE, tmp_path / "a.safetensors").read_bytes()
    metadata, tensors = parsed(content)
    digest = hashlib.sha256(bytes.fromhex("003c00c000380034" + "0001ff0105" + "003c0040")).hexdigest()
    assert list(metadata.items()) == [
        ("base_model", "tiny"),
        ("density", "0.01"),
        ("format", "shira"),
        ("format_version", "2"),
        ("library_version", shira_diffusers.__version__),
        ("run", "1"),
        ("sha256", digest),
        ("weights", '[["unet.a.weight",[4,65],3,2],["unet.b.weight",[1,6],1,0]]'),
    ]
    assert list(tensors.items()) == [
        ("values", ("F16", [4], "00 3c 00 c0 00 38 00 34")),
        ("base", ("F16", [2], "00 3c 00 40")),
        ("gaps", ("U8", [5], "00 01 ff 01 05")),  # gaps 0, 1, 256 = 255 + 1; and 5
    ]


@pytest.mark.parametrize("name", golden.FORMAT_2)
def test_golden_files_of_version_2(name: str, tmp_path: Path) -> None:
    """Written as they were once, on every machine, and read as what they were written from."""
    file, adapter = golden.FOLDER / f"{name}.safetensors", golden.FORMAT_2[name]()
    assert save_adapter(adapter, tmp_path).read_bytes() == file.read_bytes()
    golden.assert_same(load_adapter(file), adapter)
    assert inspect_adapter(file).nnz == adapter.nnz


def test_the_golden_file_of_version_1(tmp_path: Path) -> None:
    """Its bytes are the old ones, and give what they gave: dtypes too, which differ from weight to weight."""
    file, adapter = golden.FOLDER / "format_1.safetensors", golden.mixed()
    assert (
        hashlib.sha256(file.read_bytes()).hexdigest()
        == "e81c0946097b21081141602ddba0c38f8ad80621020e54405b0fe3d78ebc08a7"
    )
    loaded = load_adapter(file)
    golden.assert_same(loaded, adapter)
    assert loaded.deltas == adapter.deltas
    assert loaded.metadata == {**golden.METADATA, "density": f"{adapter.density:.6g}"}
    found = inspect_adapter(file)
    assert (found.format_version, found.nnz, found.tells_base) == ("1", adapter.nnz, True)
    for key, tensor in read_safetensors(file)[0].items():
        assert torch.equal(tensor, encode(adapter)[0][key]) and tensor.dtype == encode(adapter)[0][key].dtype
    golden.assert_same(load_adapter(save_adapter(loaded, tmp_path)), adapter)


def test_values_of_several_dtypes_are_written_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """Which holds all of them exactly; of one dtype they keep it."""
    values = torch.tensor([1 / 3, -1e-6, 100.0])
    deltas = {n: SparseDelta(torch.arange(3), values.to(d), (3,)) for n, d in (("a", torch.bfloat16), ("b", dtype))}
    loaded = load_adapter(save_adapter(ShiraAdapter(deltas), tmp_path))
    expected = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    for name, delta in deltas.items():
        assert loaded.deltas[name].values.dtype == expected
        assert torch.equal(loaded.deltas[name].values.double(), delta.values.double())


@pytest.mark.parametrize(
    ("indices", "numel", "run"),
    [
        (range(32, 64), 100, "32"),
        ([*range(32), *range(96, 128)], 128, "32"),
        (range(33, 65), 100, "1"),  # not aligned
        ([*range(31), 32], 100, "1"),
        (range(31), 100, "1"),
        ([], 100, "1"),
    ],
)
def test_runs_are_seen_where_all_entries_come_in_them(indices: list[int], numel: int, run: str, tmp_path: Path) -> None:
    delta = SparseDelta(torch.tensor(list(indices), dtype=torch.int64), torch.ones(len(indices)), (numel,))
    other = SparseDelta(torch.arange(64, 96), torch.ones(32), (100,))
    deltas = {"a": delta, "b": delta if run == "1" else other}
    file = save_adapter(ShiraAdapter(deltas), tmp_path)
    metadata, tensors = parsed(file.read_bytes())
    assert metadata["run"] == run and tensors["gaps"][1] == [sum(d.nnz for d in deltas.values()) // int(run)]
    assert load_adapter(file).deltas == deltas
    mixed = ShiraAdapter({"a": delta, "b": SparseDelta(torch.tensor([1]), torch.ones(1), (2,))})
    assert parsed(save_adapter(mixed, tmp_path).read_bytes())[0]["run"] == "1"


def test_the_document_is_enough_to_write_and_read_files(tmp_path: Path) -> None:
    """The program in docs/format.md and the library read what the other wrote."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(), re.DOTALL)
    theirs: dict[str, Any] = {}
    exec(program, theirs)
    indices = [[0, 2, 259], [], [0, 1, 254, 255 + 255, 1199], [900]]
    names, shapes = [f"unet.{number}.weight" for number in range(4)], [(4, 65), (3, 3), (30, 40), (10, 11, 3, 3)]
    deltas = {n: (i, tuple(0.5 - k for k in range(len(i))), s) for n, i, s in zip(names, indices, shapes, strict=True)}
    theirs["write"](tmp_path / "theirs.safetensors", deltas, base_model="tiny")
    loaded = load_adapter(tmp_path / "theirs.safetensors")
    assert loaded.metadata == {"base_model": "tiny"}
    found = {n: (d.indices.tolist(), tuple(d.values.tolist()), d.shape) for n, d in loaded.deltas.items()}
    assert found == deltas
    assert theirs["read"](save_adapter(loaded, tmp_path / "ours.safetensors")) == deltas
    tensors, header = encode(loaded)
    safetensors.torch.save_file(tensors, tmp_path / "version_1.safetensors", header)
    assert theirs["read"](tmp_path / "version_1.safetensors") == deltas
    assert theirs["read"](tmp_path / "theirs.safetensors") == deltas
    runs = golden.blocks()
    read = theirs["read"](golden.FOLDER / "format_2_runs.safetensors")
    assert {n: i for n, (i, _, _) in read.items()} == {n: d.indices.tolist() for n, d in runs.deltas.items()}
    wide = ShiraAdapter({"unet.a.weight": SparseDelta(torch.tensor([5, 70_000]), torch.ones(2), (300, 300))})
    for dtype, top in TOPS.items():
        tensors, header = encode(wide)
        coded = reference.code_gaps([5, 70_000], top)
        tensors["unet.a.weight.gaps"] = torch.tensor(coded, dtype=torch.int64).to(dtype)
        safetensors.torch.save_file(tensors, tmp_path / "gaps.safetensors", header)
        read = theirs["read"](tmp_path / "gaps.safetensors")
        assert read == {"unet.a.weight": ([5, 70_000], (1.0, 1.0), (300, 300))}


def test_the_examples_of_the_document(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "format.md").read_text()
    codes = {torch.float16: "F16", torch.uint8: "U8 ", torch.int64: "I64"}
    for key, tensor in encode(EXAMPLE)[0].items():
        if key.startswith("unet.a."):
            content = tensor.contiguous().view(torch.uint8).numpy().tobytes().hex(" ")
            assert f"    {key:21} {codes[tensor.dtype]} [{len(tensor)}]  {content}\n" in document
    metadata, tensors = parsed(save_adapter(EXAMPLE, tmp_path).read_bytes())
    for key, (dtype, (length,), content) in tensors.items():
        assert f"    {key:7} {dtype:3} [{length}]  {content}\n" in document
    assert f"    weights {metadata['weights']}\n    run     1\n" in document


def test_writing_again_gives_the_same_bytes(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """Of an adapter that was read, with metadata and parameters in another order, and however often."""
    adapter = adapter.with_metadata(**{f"key {number}": "Gruß" for number in range(20)})
    first = save_adapter(adapter, tmp_path / "a.safetensors")
    read = load_adapter(first)
    turned = [dict(reversed(part.items())) for part in (read.deltas, read.metadata, read.base_probes)]
    for number, same_adapter in enumerate([read, *[ShiraAdapter(*turned)] * 5]):
        again = save_adapter(same_adapter, tmp_path / f"{number}.safetensors")
        assert again.read_bytes() == first.read_bytes()


def test_round_trip_of_a_pipelines_adapter(pipe: object, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = tiny.adapter_for(pipe, dtype=dtype)
    loaded = load_adapter(save_adapter(adapter, tmp_path))
    assert loaded.deltas == adapter.deltas
    assert loaded.metadata["base_model"] == "tiny"
    assert float(loaded.metadata["density"]) == pytest.approx(adapter.density, rel=1e-5)
    assert loaded.metadata["library_version"] == shira_diffusers.__version__


def test_bytes_an_entry() -> None:
    """At most 3.09, and within 2 % of the entropy bound, at 1 % with float16 values."""
    shapes, deltas = [(1280, 1280), (320, 2560), (640, 640, 3, 3)], {}
    for number, shape in enumerate(shapes):
        generator, numel = torch.Generator().manual_seed(number), math.prod(shape)
        indices = torch.randperm(numel, generator=generator)[: round(0.01 * numel)].sort().values
        values = torch.randn(indices.numel(), generator=generator).half()
        deltas[f"unet.{number}.weight"] = SparseDelta(indices, values, shape)
    adapter = ShiraAdapter(deltas)
    content = len(serialize(adapter))
    assert content / adapter.nnz <= 3.1  # here with a header of three weights over 6 % of a model
    entropy = -math.log2(0.01) - 99 * math.log2(0.99)  # bits a position, 8.08
    gaps = sum(tensor.nbytes for key, tensor in encode(adapter)[0].items() if key.endswith(".gaps"))
    assert 8 * gaps / adapter.nnz <= entropy * 1.1
    assert content / adapter.nnz <= (entropy / 8 + 2) * 1.03


def test_bytes_per_entry_of_blocks() -> None:
    runs = torch.randperm(1280 * 1280 // 32, generator=torch.Generator().manual_seed(0))[:512].sort().values
    indices = (runs[:, None] * 32 + torch.arange(32)).flatten()
    adapter = ShiraAdapter({"unet.a.weight": SparseDelta(indices, torch.randn(len(indices)).half(), (1280, 1280))})
    assert len(serialize(adapter)) / adapter.nnz <= 2.1


BUNDLED = {  # blorp: over what its file of version 1 held, from which this one was written
    "blorp": "9920d8d47ab866bdfa99a13db7c5f7fa7dddae7f90dcb0282aedf0c468cca7e2",
    "bluefire": "a55a84cc7563a6699c538c785a68b82db48f78c0e1bfd5e631cacab4459a1099",
    "gold": "9c7442a20d255a0c7ef2ba8ed3f431dcf9d8a7bc1f19279301aeb664b9c3fe2b",
    "paintings": "22d34726ddbe06dae025c789ee8989f9f5f141409a908eba2222577e143449d5",
}


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_adapters_hold_what_they_always_held(name: str) -> None:
    file = ROOT / "assets" / "adapters" / f"{name}.safetensors"
    adapter, found = load_adapter(file), hashlib.sha256()
    for weight, delta in adapter.deltas.items():
        found.update(f"{weight} {delta.shape} {delta.values.dtype}".encode())
        for tensor in (delta.indices, delta.values, adapter.base_probes.get(weight, torch.empty(0))):
            found.update(tensor.view(torch.uint8).numpy().tobytes())
    assert found.hexdigest() == BUNDLED[name]
    assert inspect_adapter(file).format_version == "2" and inspect_adapter(file).sha256 is not None


# -------------------------------------------------------------------- gaps

positions = st.lists(st.integers(0, 400_000), unique=True, max_size=40).map(sorted)
close_together = st.lists(st.integers(0, 1200), unique=True, max_size=300).map(sorted)


@settings(max_examples=150, deadline=None)
@given(positions | close_together)
def test_gaps_round_trip_in_the_smallest_dtype(indices: list[int]) -> None:
    coded = encode_gaps(torch.tensor(indices, dtype=torch.int64))
    assert decode_gaps(coded, 400_001).tolist() == indices
    assert coded.tolist() == reference.code_gaps(indices, TOPS[coded.dtype])
    sizes = {d: len(reference.code_gaps(indices, top)) * d.itemsize for d, top in TOPS.items()}
    assert coded.nbytes == min(sizes.values())


@settings(max_examples=100, deadline=None)
@given(positions | close_together, st.sampled_from(list(TOPS)))
def test_gaps_of_other_writers(indices: list[int], dtype: torch.dtype) -> None:
    """Others may use any of the three dtypes, whichever is smallest."""
    coded = torch.tensor(reference.code_gaps(indices, TOPS[dtype]), dtype=dtype)
    assert decode_gaps(coded, 400_001).tolist() == indices
    assert reference.indices_of_gaps(coded.tolist(), TOPS[dtype]) == indices


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 7, 254, 255]) | st.integers(0, 255), max_size=20), st.integers(0, 3000))
def test_any_bytes_decode_or_are_refused(elements: list[int], numel: int) -> None:
    expected = reference.indices_of_gaps(elements, 255)
    unfinished = bool(elements) and elements[-1] == 255
    coded = torch.tensor(elements, dtype=torch.uint8)
    if unfinished or (expected and expected[-1] >= numel):
        with pytest.raises(AdapterFormatError, match="unfinished" if unfinished else "out of range"):
            decode_gaps(coded, numel)
    else:
        assert decode_gaps(coded, numel).tolist() == expected


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 65534, 65535, 65536, 131070, 2**31 - 2])
@pytest.mark.parametrize("dtype", TOPS)
def test_gaps_at_the_edges(gap: int, dtype: torch.dtype) -> None:
    if gap > 10**6 and dtype == torch.uint8:
        pytest.skip("eight million escapes in a Python list")
    indices = [gap, 2 * gap + 1] if gap < 2**30 else [gap]
    coded = torch.tensor(reference.code_gaps(indices, TOPS[dtype]), dtype=dtype)
    assert decode_gaps(coded, 2**31).tolist() == indices
    assert decode_gaps(encode_gaps(torch.tensor(indices)), 2**31).tolist() == indices


def test_gaps_beyond_int32() -> None:
    indices = torch.tensor([3, 2**31 + 10, 2**33])
    coded = encode_gaps(indices)
    assert coded.dtype == torch.uint16
    assert torch.equal(decode_gaps(coded, 2**34), indices)


def test_gaps_of_other_kinds_are_refused() -> None:
    for coded in (torch.tensor([1.0]), torch.tensor([1]), torch.zeros(1, 1, dtype=torch.uint8)):
        with pytest.raises(AdapterFormatError, match="expected uint8, uint16 or int32 of one dimension"):
            decode_gaps(coded, 10)
    with pytest.raises(AdapterFormatError, match="gap 1 is -1: indices are unsorted or duplicate"):
        decode_gaps(torch.tensor([3, -1], dtype=torch.int32), 10)
    with pytest.raises(AdapterFormatError, match="up to 10, expected at most 9"):
        decode_gaps(torch.tensor([10], dtype=torch.int32), 10)


# -------------------------------------------------------------------- other writers


def foreign(gaps: list[int], dtype: torch.dtype, values: Tensor, shape: list[int]) -> dict[str, Tensor]:
    return {
        "unet.x.weight.values": values.clone(),
        "unet.x.weight.gaps": torch.tensor(gaps, dtype=dtype),
        "unet.x.weight.shape": torch.tensor(shape),
    }


HEADER = {"format": "shira", "format_version": "1"}


@pytest.mark.parametrize("gaps", TOPS)
def test_files_of_other_writers(tmp_path: Path, gaps: torch.dtype, dtype: torch.dtype) -> None:
    """Without probes and with the bare header; each gap dtype with each value dtype."""
    indices = [0, 300, 301, 70_000]
    values = torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=dtype)
    tensors = foreign(reference.code_gaps(indices, TOPS[gaps]), gaps, values, [300, 400])
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", HEADER)
    delta = load_adapter(tmp_path).deltas["unet.x.weight"]
    assert delta == SparseDelta(torch.tensor(indices), values, (300, 400))


def test_a_folder_with_one_file_or_the_default_name(adapter: ShiraAdapter, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path / "one.safetensors")
    assert same(load_adapter(tmp_path), adapter)
    save_adapter(adapter.with_metadata(which="default"), tmp_path)
    assert load_adapter(tmp_path).metadata["which"] == "default"
    assert (tmp_path / WEIGHTS_NAME).name == "pytorch_shira_weights.safetensors"
    (tmp_path / WEIGHTS_NAME).rename(tmp_path / "two.safetensors")
    with pytest.raises(FileNotFoundError, match=r"got one\.safetensors, two\.safetensors; name the file"):
        load_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a \.safetensors file or a folder"):
        load_adapter(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="pipe is neither a file nor a folder"):
        load_adapter(tmp_path / "pipe")


def test_a_state_dict_has_no_header(adapter: ShiraAdapter) -> None:
    tensors, metadata = encode(adapter)
    assert same(decode(tensors, None, "the state dict"), adapter)
    assert same(decode(tensors, metadata, "the file"), adapter)


def test_probes_may_have_any_of_the_value_dtypes(adapter: ShiraAdapter, dtype: torch.dtype) -> None:
    tensors, metadata = encode(adapter)
    tensors["unet.a.weight.base"] = torch.ones(2, dtype=dtype)
    assert decode(tensors, metadata, "x").base_probes["unet.a.weight"].dtype == dtype


def test_deltas_that_share_memory(tmp_path: Path) -> None:
    values = torch.arange(4.0)
    deltas = {"a.weight": SparseDelta(torch.tensor([0, 1]), values[:2], (2, 2))}
    deltas["b.weight"] = SparseDelta(torch.tensor([0, 3]), values[1:3], (2, 2))
    deltas["c.weight"] = deltas["b.weight"]
    assert load_adapter(save_adapter(ShiraAdapter(deltas), tmp_path)).deltas == deltas


# -------------------------------------------------------------------- the checksum


def large_adapter(nnz: int) -> ShiraAdapter:
    values = torch.linspace(-1, 1, nnz).half()
    return ShiraAdapter({"unet.a.weight": SparseDelta(torch.arange(nnz) * 2, values, (2, nnz))})


@pytest.mark.parametrize("nnz", [1000, 400_000], ids=["at once", "in a thread"])
def test_a_flipped_bit_in_the_tensors_is_refused(nnz: int, tmp_path: Path) -> None:
    """Each bit of a byte, anywhere; such files were read as other adapters."""
    path = save_adapter(large_adapter(nnz), tmp_path / "a.safetensors")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(8):
        content = bytearray(whole)
        content[start + 20 + bit * ((len(whole) - start - 20) // 8)] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(AdapterFormatError, match=rf"{re.escape(str(path))}.*get an intact copy"):
            load_adapter(path)
    path.write_bytes(whole)
    assert same(load_adapter(path), large_adapter(nnz))


def test_the_message_about_damage_names_both_digests(adapter: ShiraAdapter, tmp_path: Path) -> None:
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())

    def digest() -> str:
        """Over values, gaps and base, in this order."""
        tensors = parsed(bytes(content))[1]
        return hashlib.sha256(bytes.fromhex("".join(tensors[key][2] for key in ("values", "gaps", "base")))).hexdigest()

    written = digest()
    content[content.index(b"\x00\x3c\x00\xc0\x00\x38")] ^= 1  # 1.0 becomes its neighbour
    path.write_bytes(content)
    now = digest()
    assert parsed(bytes(content))[0]["sha256"] == written != now
    with pytest.raises(AdapterFormatError) as told:
        load_adapter(path)
    assert f"is damaged: the SHA-256 of its tensors is {now}, expected {written} as its header says" in str(told.value)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each checksum that is computed."""
    found: list[int] = []
    real = adapter_file.digest
    monkeypatch.setattr(adapter_file, "digest", lambda *parts: (found.append(len(parts)), real(*parts))[1])
    monkeypatch.setattr(adapter_file, "_verified", {})
    return found


def test_a_file_is_hashed_again_only_once_it_was_written(
    adapter: ShiraAdapter, tmp_path: Path, hashed: list[int]
) -> None:
    """Changed bytes of the same size and with the time of the last change put back are refused."""
    file = save_adapter(adapter, tmp_path / "a.safetensors")
    time.sleep(0.06)
    for _ in range(3):
        assert same(load_adapter(file), adapter)
    assert open_adapter(file).decode() and len(hashed) == 1
    before, content = file.stat(), bytearray(file.read_bytes())
    content[content.index(b"\x00\x3c\x00\xc0\x00\x38")] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    time.sleep(0.06)
    for _ in range(2):
        with pytest.raises(AdapterFormatError, match="is damaged: the SHA-256"):
            load_adapter(file)
    assert len(hashed) == 3


def test_a_file_that_was_just_written_is_hashed_each_time(
    adapter: ShiraAdapter, tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further write could leave all of its times as they are."""
    file = save_adapter(adapter, tmp_path / "a.safetensors")
    written = file.stat().st_ctime_ns
    for milliseconds, count in ((-1, 1), (49, 2), (51, 3), (51, 3)):
        now = written + milliseconds * 1_000_000
        monkeypatch.setattr(safetensors_bytes.time, "time_ns", lambda now=now: now)
        load_adapter(file)
        assert len(hashed) == count


def test_a_file_that_is_written_while_it_is_decoded_is_hashed_again(
    adapter: ShiraAdapter, tmp_path: Path, hashed: list[int]
) -> None:
    file = save_adapter(adapter, tmp_path / "a.safetensors")
    time.sleep(0.06)
    load_adapter(file)
    opened, content = open_adapter(file), bytearray(file.read_bytes())
    content[content.index(b"\x00\x3c\x00\xc0\x00\x38")] ^= 1
    with pytest.raises(AdapterFormatError, match="is damaged: the SHA-256"), opened.compared():
        file.open("r+b").write(content)
    time.sleep(0.06)
    with pytest.raises(AdapterFormatError, match="is damaged: the SHA-256"):
        load_adapter(file)


def test_nothing_reads_a_file_any_more_once_it_was_refused(tmp_path: Path) -> None:
    """Who repairs it in place would end the process: a mapped file that is cut under a reader is a bus error."""
    count = 2_000_000
    delta = SparseDelta(torch.arange(count, dtype=torch.int32), torch.ones(count), (2 * count,))
    file = save_adapter(ShiraAdapter({"w": delta}), tmp_path / "a.safetensors")
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[8 + header + json.loads(content[8 : 8 + header])["gaps"]["data_offsets"][0]] = 255
    file.write_bytes(content)
    with pytest.raises(AdapterFormatError, match="gaps"):
        load_adapter(file)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("shira-checksum")]


def test_files_without_a_checksum_load_as_before(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """Those of older versions and of other writers; and tensors without their file, whatever a header said."""
    tensors, metadata = encode(adapter)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata)
    assert "sha256" not in metadata
    assert same(load_adapter(tmp_path), adapter)
    assert same(decode(tensors, metadata | {"sha256": "another"}, "the state dict"), adapter)


def test_the_checksum_is_the_files_not_the_adapters(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """So an adapter that is changed after it was read, and saved again, gets its own."""
    read = load_adapter(save_adapter(adapter, tmp_path / "a.safetensors"))
    assert "sha256" not in read.metadata
    for changed in (read.astype(torch.bfloat16), read.with_metadata(sha256="of another file")):
        assert load_adapter(save_adapter(changed, tmp_path / "b.safetensors")).deltas == changed.deltas


def test_other_details_of_damage_are_told_first(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """What is wrong with which parameter says more than two digests."""
    content = safetensors.torch.save(encode(adapter)[0], {**HEADER, "sha256": "0" * 64})
    path = tmp_path / "a.safetensors"
    path.write_bytes(content.replace(b"\x00\x3c\x00\xc0\x00\x38", b"\x00\x7c\x00\xc0\x00\x38"))
    with pytest.raises(AdapterFormatError, match=r"unet\.a\.weight: .*1 of 3 values is NaN or infinite"):
        load_adapter(path)


# -------------------------------------------------------------------- damage


def test_a_file_cut_off_anywhere(adapter: ShiraAdapter, tmp_path: Path) -> None:
    content = save_adapter(adapter, tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(1, 24), *range(24, len(content), 17), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(AdapterFormatError, match=rf"got {length} bytes that look damaged or truncated"):
            load_adapter(cut)
    cut.write_bytes(content + b"more")
    with pytest.raises(AdapterFormatError, match="damaged or truncated"):
        load_adapter(cut)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_refused_or_gives_an_adapter(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Nothing but a valid adapter or an AdapterFormatError comes of a damaged file."""
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    delta = SparseDelta(torch.tensor([1, 300]), torch.ones(2), (20, 20))
    adapter = ShiraAdapter({"unet.a.weight": delta}, {}, {"unet.a.weight": torch.ones(2).half()})
    content = bytearray(save_adapter(adapter, path).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        assert load_adapter(path).nnz >= 0
    except AdapterFormatError as error:
        assert str(path) in str(error)


def test_a_file_that_is_written_anew_in_place(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """As ``cp`` does it: what was read before stays, and to use it does not end the process."""
    file = save_adapter(adapter, tmp_path / "a.safetensors")
    size = file.stat().st_size
    read = load_adapter(file)
    file.write_bytes(bytes(size))
    assert same(read, adapter)


def test_a_state_dict_that_is_changed_later(adapter: ShiraAdapter) -> None:
    tensors, metadata = encode(adapter)
    read = decode(tensors, metadata, "the state dict")
    for tensor in tensors.values():
        tensor.zero_()
    assert same(read, adapter)


def test_a_file_that_is_replaced_while_it_is_read(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """Its parts are never those of two files: it is opened several times, by name."""
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    other = ShiraAdapter(
        {"unet.a.weight": SparseDelta(torch.tensor([7]), torch.tensor([0.75]), (4, 65))}, {"new": "yes"}
    )
    left = [1]

    def read(file: Path) -> Bytes:
        if left:
            left.pop()
            save_adapter(other, path)
        return mapped(file)

    tensors, metadata, *_ = open_safetensors(path, read)
    found = decode({key: tensor_of(raw) for key, raw in tensors.items()}, metadata, "the file")
    assert same(found, other) and metadata["new"] == "yes"
    left += range(9)
    with pytest.raises(AdapterFormatError, match="changed each time it was read, expected a whole file"):
        open_safetensors(path, read)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os._exit, (1,)

    for zipped in (True, False):
        path = tmp_path / f"{zipped}.safetensors"
        torch.save({"x": Bomb()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(AdapterFormatError, match="a pickle, which is never loaded"):
            load_adapter(path)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"x": Bomb()}, protocol))
        with pytest.raises(AdapterFormatError, match="a pickle, which is never loaded"):
            load_adapter(path)


def test_a_file_that_may_not_be_read(adapter: ShiraAdapter) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lie where only one user may look
        path = save_adapter(adapter, Path(folder, "a.safetensors"))
        os.chmod(folder, 0o755)
        path.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # root may read everything
                os.seteuid(65534)
            with pytest.raises(PermissionError, match="Permission denied"):
                load_adapter(path)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "shira", "format_version": "3"}, "format version '3', expected '1' or '2'; .*upgrade"),
        ({"format": "shira", "format_version": "2"}, "unet.a.weight.shape: unknown key, expected values, gaps or base"),
        ({"format": "shira"}, "format version None"),
        ({"format": "pt"}, "header format is 'pt', expected 'shira'; check the path"),
        ({}, "header format is None"),
    ],
)
def test_other_headers(adapter: ShiraAdapter, tmp_path: Path, header: dict[str, str], message: str) -> None:
    safetensors.torch.save_file(encode(adapter)[0], tmp_path / "x.safetensors", header)
    with pytest.raises(AdapterFormatError, match=message):
        load_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "key", ["unet.x.to_q.lora_A.weight", "lora_unet_x.lora_down.weight", "unet.x.lora.down.weight"]
)
def test_a_lora_file(tmp_path: Path, key: str) -> None:
    safetensors.torch.save_file({key: torch.ones(2, 2)}, tmp_path / "x.safetensors", {"format": "pt"})
    with pytest.raises(AdapterFormatError, match="looks like a LoRA, load it with load_lora_weights"):
        load_adapter(tmp_path)


FLOAT8 = torch.tensor([0, 1], dtype=torch.uint8).view(torch.float8_e4m3fn)
ONES, PLAIN = torch.ones(2), {"unet.y.weight.gaps": torch.zeros(1, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**foreign([0, 1], torch.uint8, ONES, [2, 3]), "unet.x.weight.alpha": ONES}, "weight.alpha: unknown key"),
        ({**foreign([0, 1], torch.uint8, ONES, [2, 3]), "values": ONES}, "values: unknown key"),
        (PLAIN, r"unet\.y\.weight: \.values, \.shape missing"),
        (foreign([0, -1], torch.int32, ONES, [2, 3]), "gap 1 is -1: indices are unsorted or duplicate"),
        (foreign([0, 9], torch.int32, ONES, [2, 3]), "out of range: up to 10, expected at most 5"),
        (foreign([0, 255], torch.uint8, ONES, [20, 30]), "unfinished"),
        (foreign([0], torch.uint8, ONES, [2, 3]), "one value per index"),
        (foreign([0, 1], torch.uint8, ONES * torch.nan, [2, 3]), "2 of 2 values are NaN or infinite"),
        (foreign([0, 1], torch.uint8, ONES * torch.inf, [2, 3]), "NaN or infinite"),
        (foreign([0, 1], torch.uint8, ONES.double(), [2, 3]), "expected float32, float16 or bfloat16"),
        (foreign([0, 1], torch.uint8, ONES.view(1, 2), [2, 3]), "one value per index"),
        (foreign([0, 1], torch.int64, ONES, [2, 3]), "expected uint8, uint16 or int32"),
        (foreign([0, 1], torch.uint8, ONES, [2, -3]), "expected int64 sizes"),
        (foreign([0, 1], torch.uint8, ONES, [2.0, 3.0]), "expected int64 sizes"),
        (foreign([0, 1], torch.uint8, ONES, [[2, 3]]), "expected int64 sizes"),
        (foreign([0, 1], torch.uint8, ONES, [2**40, 2**40]), "more entries than any tensor"),
        (
            {**foreign([0, 1], torch.uint8, ONES, [2, 3]), "unet.x.weight.gaps": FLOAT8},
            "gaps are .*, expected uint8, uint16 or",
        ),
        (foreign([0, 1], torch.uint8, ONES, [2] * 65), "shape has 65 dimensions, expected at most 64"),
        ({**foreign([0, 1], torch.uint8, ONES, [2, 3]), "unet.x.weight.base": torch.ones(3).half()}, "3 base values"),
        ({**foreign([0, 1], torch.uint8, ONES, [2, 3]), "unet.x.weight.base": torch.ones(2).long()}, "base is"),
    ],
)
def test_damaged_contents(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    """In a file and in a state dict; a whole adapter beside the damaged one does not save it."""
    tensors = {**tensors, **{k.replace("x", "good"): v for k, v in foreign([1, 2], torch.uint8, ONES, [3, 3]).items()}}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", HEADER)
    with pytest.raises(AdapterFormatError, match=message) as told:
        load_adapter(tmp_path)
    assert "get an intact copy" in str(told.value)
    with pytest.raises(AdapterFormatError, match=message):
        decode(tensors, None, "the state dict")


ROW = ["unet.x.weight", [2, 3], 2, 0]
WHOLE = {"values": ONES, "gaps": torch.tensor([0, 1], dtype=torch.uint8)}


def table_of(*rows: object) -> dict[str, str]:
    return {"weights": json.dumps(rows)}


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({**WHOLE, "scale": ONES.clone()}, {}, "scale: unknown key, expected values, gaps or base"),
        ({"values": ONES}, {}, "gaps: missing, expected values and gaps"),
        ({**WHOLE, "values": ONES.double()}, {}, "values are float64 .* expected one dimension of float16, bfloat16, "),
        ({**WHOLE, "values": ONES.view(1, 2)}, {}, r"values are float32 \(1, 2\), expected one dimension"),
        (
            {**WHOLE, "gaps": torch.tensor([0, 1])},
            {},
            "gaps are int64 .* expected one dimension of uint8, uint16, int32",
        ),
        ({**WHOLE, "values": ONES * torch.inf}, {}, r"unet.x.weight: .* 2 of 2 values are NaN or infinite"),
        (
            {**WHOLE, "gaps": torch.tensor([0, -1], dtype=torch.int32)},
            {},
            "unet.x.weight: gap 1 is -1: indices are uns",
        ),
        (
            {**WHOLE, "gaps": torch.tensor([0, 9], dtype=torch.uint8)},
            {},
            "unet.x.weight: .*range: up to 10, expected at",
        ),
        ({**WHOLE, "gaps": torch.tensor([0, 255], dtype=torch.uint8)}, {}, "gaps code 1 indices, expected 2"),
        ({**WHOLE, "gaps": torch.tensor([0, 1, 255], dtype=torch.uint8)}, {}, "the last gap is unfinished"),
        ({**WHOLE, "gaps": torch.tensor([0], dtype=torch.uint8)}, {}, "gaps code 1 indices, expected 2"),
        (
            {**WHOLE, "base": ONES.half()},
            {},
            "base: 2 in the file, 0 in the table of weights, expected the same number",
        ),
        ({**WHOLE, "base": ONES.long()}, {}, "base are int64"),
        (WHOLE, table_of([*ROW[:2], 3, 0]), "values: 2 in the file, 3 in the table of weights"),
        (WHOLE, table_of([*ROW[:2], 2, 1]), "base: 0 in the file, 1 in the table"),
        (WHOLE, {"weights": "["}, "weights: expected a JSON list of"),
        (WHOLE, {"weights": "[]"}, "weights: expected a JSON list of"),
        (WHOLE, {"weights": "{}"}, "weights: expected a JSON list of"),
        (WHOLE, {"weights": "[" * 100_000}, "weights: expected a JSON list of"),
        (WHOLE, {"weights": None}, "weights: expected a JSON list of"),
        (WHOLE, table_of(["unet.x.weight", [2, 3], 2]), r"weights: expected \[name, shape, nnz, probes\], got"),
        (WHOLE, table_of([7, [2, 3], 2, 0]), r"weights: expected \[name, shape, nnz, probes\], got"),
        (WHOLE, table_of(["", [2, 3], 2, 0]), r"weights: expected \[name, shape, nnz, probes\], got"),
        (WHOLE, table_of(["x", [2, 3], True, 0]), r"weights: expected \[name, shape, nnz, probes\], got"),
        (WHOLE, table_of(["x", [2, 3], 2.0, 0]), r"weights: expected \[name, shape, nnz, probes\], got"),
        (WHOLE, table_of(["x", [2, -3], 2, 0]), r"x: shape is \[2, -3\], expected int64 sizes of 0 or more"),
        (WHOLE, table_of(["x", [2, 3.0], 2, 0]), "x: shape is .*expected int64 sizes of 0 or more"),
        (WHOLE, table_of(["x", [2**40, 2**40], 2, 0]), "more entries than any tensor"),
        (WHOLE, table_of(["x", [0, 2**64, 5], 0, 0]), "more entries than any tensor"),
        (WHOLE, table_of(["x", [10**4000] * 64, 2, 0]), r"(?s)^.{,400}more entries than any tensor"),
        (WHOLE, table_of(["\ud800", [2, 3], 2, 0]), r"weights: expected \[name, shape, nnz, probes\], got"),
        (WHOLE, table_of(["x", [1] * 65, 1, 0]), "shape has 65 dimensions, expected at most 64"),
        (WHOLE, table_of(["x", [2, 3], 7, 0]), "x: 7 entries of 6 and 0 base values in the table, expected no more"),
        (WHOLE, table_of(["x", [2, 3], 2, 3]), "x: 2 entries of 6 and 3 base values in the table, expected no more"),
        (WHOLE, table_of(["x", [2, 3], -2, 0]), "in the table, expected no more"),
        (WHOLE, table_of(["b", [3], 1, 0], ["a", [3], 1, 0]), "a: not after b in the table"),
        (WHOLE, table_of(["a", [3], 1, 0], ["a", [3], 1, 0]), "a: not after a in the table"),
        (WHOLE, {"run": "16"}, "run: expected '1' or '32', got '16'"),
        (WHOLE, {"run": None}, "run: expected '1' or '32', got None"),
        (WHOLE, {"run": "32"}, "unet.x.weight: 2 entries, expected runs of 32"),
        (
            {"values": torch.ones(32), "gaps": torch.tensor([1], dtype=torch.uint8)},
            {"run": "32", **table_of(["x", [63], 32, 0])},
            "x: indices are out of range: up to 1, expected at most 0",
        ),
        (WHOLE, {"sha256": "0" * 64}, "is damaged: the SHA-256 of its tensors is"),
    ],
)
def test_damaged_contents_of_version_2(
    tmp_path: Path, tensors: dict[str, Tensor], header: dict[str, str | None], message: str
) -> None:
    """By all who read files, in the same words."""
    whole = {"format": "shira", "format_version": "2", "run": "1", **table_of(ROW), **header}
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, file, {key: value for key, value in whole.items() if value is not None})
    with pytest.raises(AdapterFormatError, match=message) as told:
        load_adapter(file)
    assert "get an intact copy" in str(told.value)
    for read in (inspect_adapter, lambda file: open_adapter(file).decode_on(DeviceDecoder(torch.device("cpu")))):
        with pytest.raises(AdapterFormatError) as again:
            read(file)
        assert str(again.value) == str(told.value)


def test_the_tensors_of_version_2_alone_are_no_adapter(adapter: ShiraAdapter, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(save_adapter(adapter, tmp_path))
    with pytest.raises(AdapterFormatError, match=r"of format version 2, but not its header.*the file"):
        decode(tensors, None, "the state dict")


def test_metadata_that_is_called_like_the_files_own(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """The file's wins, as for the checksum; of version 1, which has none such, the adapter keeps it."""
    written = load_adapter(save_adapter(adapter.with_metadata(run="7", weights="all", steps="3"), tmp_path))
    assert written.deltas == adapter.deltas and written.metadata["steps"] == "3"
    assert not {"run", "weights", "sha256", "format", "format_version"} & written.metadata.keys()
    assert decode(*encode(adapter.with_metadata(run="7")), "the file").metadata["run"] == "7"


def test_halves_of_surrogate_pairs(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """As in names of files that are not UTF-8."""
    odd = os.fsdecode(b"style\xff")
    written = load_adapter(save_adapter(adapter.with_metadata(**{"lora": odd, odd: "x"}), tmp_path))
    assert (written.metadata["lora"], written.metadata["style\\udcff"]) == ("style\\udcff", "x")


@pytest.mark.parametrize("write", [encode, serialize])
def test_names_that_no_reader_takes_are_refused(adapter: ShiraAdapter, write: Callable[..., object]) -> None:
    renamed = adapter.renamed({"unet.a.weight": "", "unet.b.weight": "unet.\udcff"})
    with pytest.raises(AdapterFormatError, match=r"^2 of 2 parameters cannot .*\n  - ''\n  - 'unet\.\\udcff'$"):
        write(renamed)


def test_all_offenders_are_named_at_once() -> None:
    tensors = {}
    for number in range(12):
        delta = foreign([0, 9], torch.int32, ONES, [2, 3])
        tensors |= {key.replace("x", f"n{number:02}"): tensor for key, tensor in delta.items()}
    with pytest.raises(AdapterFormatError, match=r"n00[\s\S]*n07[\s\S]*and 4 more"):
        decode(tensors, HEADER, "the file")


def test_nothing_at_all() -> None:
    with pytest.raises(AdapterFormatError, match="holds no tensors"):
        decode({}, HEADER, "the file")


# -------------------------------------------------------------------- atomic writing


def test_writing_makes_folders_and_keeps_the_umask(adapter: ShiraAdapter, tmp_path: Path) -> None:
    written = save_adapter(adapter, tmp_path / "new" / "folder")
    assert written == tmp_path / "new" / "folder" / WEIGHTS_NAME
    plain = tmp_path / "plain"
    plain.touch()
    assert written.stat().st_mode == plain.stat().st_mode


def test_an_adapter_without_deltas_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="holds no deltas"):
        save_adapter(ShiraAdapter({}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_where_nothing_can_be_written_the_target_is_named(tmp_path: Path) -> None:
    """Not the temporary file, of which nobody knows."""
    target = tmp_path / "missing" / "a.png"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(target, b"x")
    assert caught.value.filename == str(target)
    with pytest.raises(FileNotFoundError) as caught, made_whole(target) as temporary:
        temporary.mkdir()
    assert caught.value.filename == str(target)
    with pytest.raises(FileNotFoundError) as caught, made_whole(tmp_path / "new"):
        target.read_bytes()
    assert caught.value.filename == str(target)


def test_the_umask_is_never_touched(adapter: ShiraAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one for all threads: what others write meanwhile, everybody could write to."""

    def refuse(mask: int) -> int:
        raise AssertionError(f"umask({mask:o})")

    monkeypatch.setattr(os, "umask", refuse)
    save_adapter(adapter, tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_crash_while_writing_leaves_the_old_file(
    adapter: ShiraAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    old = path.read_bytes()

    def crash(*_: object) -> None:
        raise error("power cut")

    monkeypatch.setattr(shira_diffusers.atomic_write.os, step, crash)
    with pytest.raises(error, match="power cut"):
        save_adapter(adapter.with_metadata(new="yes"), path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_content_is_on_disk_before_the_name(
    adapter: ShiraAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for step in ("fsync", "replace"):
        real = getattr(os, step)
        monkeypatch.setattr(
            shira_diffusers.atomic_write.os, step, lambda *a, step=step, real=real: (order.append(step), real(*a))[1]
        )
    save_adapter(adapter, tmp_path)
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt"])
def test_a_file_of_another_format_is_not_taken_for_a_folder(adapter: ShiraAdapter, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterFormatError, match=rf"expected a \.safetensors file or a folder .*, got .*{name}"):
        save_adapter(adapter, tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / name).mkdir()
    assert save_adapter(adapter, tmp_path / name).parent == tmp_path / name


# -------------------------------------------------------------------- one door for all files


def test_an_open_adapter_tells_what_its_header_does(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """Of both versions, before anything is decoded: damaged values do not matter."""
    tensors, header = encode(adapter)
    safetensors.torch.save_file(tensors, tmp_path / "1.safetensors", header)
    content = save_adapter(adapter, tmp_path / "2.safetensors").read_bytes()
    (tmp_path / "2.safetensors").write_bytes(content.replace(b"\x00\x3c\x00\xc0", b"\xff\xff\xff\xff"))
    for version in "12":
        file = tmp_path / f"{version}.safetensors"
        opened = open_adapter(file)
        assert (opened.format_version, opened.is_peft, opened.kind) == (version, False, "SHiRA adapter")
        assert (opened.path, opened.size) == (file, file.stat().st_size)
        assert [tuple(each) for each in opened.parameters] == [
            (n, d.shape, d.nnz, "F16") for n, d in adapter.deltas.items()
        ]
        assert (opened.components, opened.nnz, opened.tells_base) == (["unet"], 4, True)
        assert opened.metadata["base_model"] == "tiny" and "weights" not in opened.metadata
        assert opened.decoded_nbytes == adapter.nbytes
    assert same(open_adapter(tmp_path / "1.safetensors").decode(), adapter)
    with pytest.raises(AdapterFormatError, match="NaN or infinite"):
        open_adapter(tmp_path / "2.safetensors").decode()


def test_an_open_adapter_of_peft_needs_a_model(tmp_path: Path) -> None:
    from peft import ShiraConfig, get_peft_model

    config = ShiraConfig(r=2, target_modules=["to_q"], init_weights=False)
    get_peft_model(tiny.unet(), config).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        opened = open_adapter(path)
        assert (opened.format_version, opened.is_peft, opened.components) == (None, True, [])
        assert opened.parameters and all(each.shape is None for each in opened.parameters)
        with pytest.raises(AdapterFormatError, match="is a PEFT adapter, which does not store the weights' shapes"):
            opened.decode()
        found = opened.decode(models={"unet": tiny.unet(), "text_encoder": tiny.text_encoder()})
        assert found.component_names() == ["unet"] and found.nnz == opened.nnz
