"""The file format: golden bytes, round trips, other writers' files, and every kind of damage."""

import hashlib
import json
import math
import os
import pickle
import re
import struct
import tempfile
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
from shira_diffusers.atomic_write import write_atomically
from shira_diffusers.formats.gap_codec import decode_gaps, encode_gaps
from shira_diffusers.formats.safetensors_bytes import Bytes, mapped, open_safetensors
from shira_diffusers.formats.shira_file import WEIGHTS_NAME, decode, encode
from tests import reference, tiny

ROOT = Path(__file__).parents[2]
TOPS = {torch.uint8: 255, torch.uint16: 65535, torch.int32: None}


@pytest.fixture
def adapter() -> ShiraAdapter:
    return ShiraAdapter(
        {
            "unet.a.weight": SparseDelta(torch.tensor([0, 2, 259]), torch.tensor([1.0, -2.0, 0.5]).half(), (4, 65)),
            "unet.b.weight": SparseDelta(torch.tensor([5]), torch.tensor([0.25]), (1, 2, 3, 1)),
        },
        {"base_model": "tiny", "density": "0.01"},
        {"unet.a.weight": torch.tensor([1.0, 2.0]).half()},
    )


def same(one: ShiraAdapter, other: ShiraAdapter) -> bool:
    return one.deltas == other.deltas and one.base_probes.keys() == other.base_probes.keys()


# -------------------------------------------------------------------- the bytes themselves


def test_golden_bytes(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """The whole file, byte for byte, as docs/format.md lets another program write or read it."""
    content = save_adapter(adapter, tmp_path / "a.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    assert header.pop("__metadata__") == {
        "base_model": "tiny",
        "density": "0.01",
        "format": "shira",
        "format_version": "1",
        "library_version": shira_diffusers.__version__,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    tensors = {
        key: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])].hex())
        for key, entry in header.items()
    }
    assert tensors == {
        "unet.a.weight.values": ("F16", [3], "003c" + "00c0" + "0038"),
        "unet.a.weight.gaps": ("U8", [4], "00" + "01" + "ff01"),  # gaps 0, 1, 256 = 255 + 1
        "unet.a.weight.shape": ("I64", [2], "0400000000000000" + "4100000000000000"),
        "unet.a.weight.base": ("F16", [2], "003c" + "0040"),
        "unet.b.weight.values": ("F32", [1], "0000803e"),
        "unet.b.weight.gaps": ("U8", [1], "05"),
        "unet.b.weight.shape": ("I64", [4], "01000000000000000200000000000000030000000000000001" + "00" * 7),
    }


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
    wide = ShiraAdapter({"unet.a.weight": SparseDelta(torch.tensor([5, 70_000]), torch.ones(2), (300, 300))})
    for dtype, top in TOPS.items():
        tensors, header = encode(wide)
        coded = reference.code_gaps([5, 70_000], top)
        tensors["unet.a.weight.gaps"] = torch.tensor(coded, dtype=torch.int64).to(dtype)
        safetensors.torch.save_file(tensors, tmp_path / "gaps.safetensors", header)
        read = theirs["read"](tmp_path / "gaps.safetensors")
        assert read == {"unet.a.weight": ([5, 70_000], (1.0, 1.0), (300, 300))}


def test_the_example_of_the_document(adapter: ShiraAdapter) -> None:
    document = (ROOT / "docs" / "format.md").read_text()
    codes = {torch.float16: "F16", torch.uint8: "U8 ", torch.int64: "I64"}
    for key, tensor in encode(adapter)[0].items():
        if key.startswith("unet.a."):
            content = tensor.contiguous().view(torch.uint8).numpy().tobytes().hex(" ")
            assert f"    {key:21} {codes[tensor.dtype]} [{len(tensor)}]  {content}\n" in document


def test_golden_hash_of_a_whole_file(adapter: ShiraAdapter, tmp_path: Path) -> None:
    """The same adapter is the same file, on every machine."""
    content = save_adapter(adapter.with_metadata(library_version="0"), tmp_path).read_bytes()
    assert hashlib.sha256(content).hexdigest() == "b9ec7267084022f560792cdb1e30d72d8d56763568e9a4257a7b4c1b6f29aa04"


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
    """At most 3.1, and within 3 % of the entropy bound of the positions, at 1 % with float16 values."""
    shapes, deltas = [(1280, 1280), (320, 2560), (640, 640, 3, 3)], {}
    for number, shape in enumerate(shapes):
        generator, numel = torch.Generator().manual_seed(number), math.prod(shape)
        indices = torch.randperm(numel, generator=generator)[: round(0.01 * numel)].sort().values
        values = torch.randn(indices.numel(), generator=generator).half()
        deltas[f"unet.{number}.weight"] = SparseDelta(indices, values, shape)
    adapter = ShiraAdapter(deltas)
    content = len(safetensors.torch.save(*encode(adapter)))
    assert content / adapter.nnz <= 3.1
    entropy = -math.log2(0.01) - 99 * math.log2(0.99)  # bits a position, 8.08
    gaps = sum(tensor.nbytes for key, tensor in encode(adapter)[0].items() if key.endswith(".gaps"))
    assert 8 * gaps / adapter.nnz <= entropy * 1.1
    assert content / adapter.nnz <= (entropy / 8 + 2) * 1.03


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
    written = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    content[content.index(b"\x00\x3c\x00\xc0\x00\x38")] ^= 1  # 1.0 becomes its neighbour
    path.write_bytes(content)
    now = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    with pytest.raises(AdapterFormatError) as told:
        load_adapter(path)
    assert f"is damaged: the SHA-256 of its tensors is {now}, expected {written} as its header says" in str(told.value)


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

    tensors, metadata, _ = open_safetensors(path, read)
    assert same(decode(tensors, metadata, "the file"), other) and metadata["new"] == "yes"
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
        ({"format": "shira", "format_version": "2"}, "format version '2', expected '1'; .*upgrade"),
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
