"""Mutated files: ours and PEFT's, with bytes flipped, set, inserted, deleted, doubled or cut off, or another header.

Each loads to something valid, or is refused with a ``ShiraError`` that leaves nothing changed; no other exception, no
huge allocation. The checksum is put right in most, so that what lies behind it is reached.
"""

import copy
import hashlib
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import ShiraConfig, get_peft_model

from shira_diffusers import AdapterFormatError, ShiraAdapter, ShiraError, SparseDelta, load_adapter, save_adapter
from tests import reference
from tests.soak.operations import Difference, live_weights, pool, small_pipeline, small_unet

VALUES: tuple[Any, ...] = (
    0, -1, 1, 3, 2**31, 2**53, 2**63 - 1, 2**64, 0.5, 1e308, float("nan"), None, True, "", "x", "1", "2", "32", "\0",
    "\ud800", "é" * 300, "F8_E4M3", "F64", "BOOL", "U8", "I32", "F16", [], {}, [[]], [0, 0], [2**40, 2**40], [-1, 2],
)  # fmt: skip
_ROOM = 2**29  # bytes that loading a file of some kilobytes may take


def originals(folder: Path) -> list[Path]:
    """Intact files: of ours some, with base values, with gaps of all widths; and a folder of PEFT's."""
    first, second, third = pool()[0], pool()[1], pool()[3]
    probes = {name: torch.zeros(2, dtype=torch.float16) for name in list(first.deltas)[:3]}
    made = [
        ShiraAdapter(dict(list(first.deltas.items())[:4]), first.metadata, probes),
        ShiraAdapter(dict(list(second.deltas.items())[:2]), {"instance_prompt": "a é"}),
        third,
        ShiraAdapter({"unet.conv_in.weight": SparseDelta(torch.tensor([5]), torch.ones(1), (8, 4, 3, 3))}),
        pool()[4],
    ]
    files = [save_adapter(adapter, folder / f"{k}.safetensors") for k, adapter in enumerate(made)]
    torch.manual_seed(0)
    model = get_peft_model(small_unet(), ShiraConfig(r=1, target_modules=["to_q"], init_weights=False))
    model.save_pretrained(folder / "peft")
    return [*files, folder / "peft"]


# -------------------------------------------------------------------- how a file is mutated


def mutated(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Another content, and what was done, for the message about a difference."""
    size = 8 + int.from_bytes(content[:8], "little")
    header, body = content[8:size], content[size:]
    kind = rng.choice(["length", "header", "body", "body", "tree", "tree", "tree", "any"])
    if kind == "any":
        return scrambled(rng, content), kind
    if kind == "length":
        return scrambled(rng, content[:8])[:8].ljust(8, b"\0") + content[8:], kind
    if kind == "body":
        body = scrambled(rng, body)
    elif kind == "header":
        header = scrambled(rng, header)
    else:
        tree = json.loads(header)
        for _ in range(rng.randint(1, 3)):
            change(rng, tree)
        header = dumped(tree)
    checksum = rng.choice(["right", "right", "none", "old"])
    if checksum != "old":
        header = with_checksum(header, body if checksum == "right" else None)
    length = len(header) if rng.random() < 0.9 else size - 8
    return length.to_bytes(8, "little") + header + body, f"{kind}, checksum {checksum}"


def scrambled(rng: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, set, inserted, deleted, doubled or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 40])
        kind = rng.choice(["flip", "flip", "set", "insert", "delete", "double", "cut"])
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "set":
            data[at : at + length] = bytes([rng.choice([0, 1, 127, 128, 255, 34])]) * len(data[at : at + length])
        elif kind == "insert":
            data[at:at] = rng.randbytes(length)
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def change(rng: random.Random, tree: Any) -> None:
    """One change somewhere in a header: another value, a key lost or renamed, two values exchanged."""
    place = rng.choice([one for one in places(tree) if one])
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key, other = rng.choice(keys), rng.choice(keys)
    kind = rng.choice(["value", "value", "near", "lose", "rename", "exchange"])
    if kind == "value":
        place[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "near" and isinstance(place[key], int):
        place[key] += rng.choice([-1, 1, -8, 8, 2**32])
    elif kind == "lose":
        del place[key]
    elif kind == "rename" and isinstance(place, dict):
        place[rng.choice([f"{key}x", "", "a.values", "b.gaps", "unet..shape", "é", str(other)])] = place.pop(key)
    elif kind == "exchange":
        place[key], place[other] = place[other], place[key]


def places(tree: Any) -> Iterator[Any]:
    """All mappings and lists of a tree."""
    if isinstance(tree, dict | list):
        yield tree
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from places(part)


def dumped(tree: object) -> bytes:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def with_checksum(header: bytes, body: bytes | None) -> bytes:
    """With the right one of a body, or without any; a header that cannot be read stays as it is."""
    try:
        tree = json.loads(header)
        metadata = tree["__metadata__"]
        metadata.pop("sha256", None)
        if body is not None:
            metadata["sha256"] = hashlib.sha256(body).hexdigest()
        return dumped(tree)
    except (ValueError, KeyError, TypeError, AttributeError):
        return header


# -------------------------------------------------------------------- what becomes of it


class Mutants:
    """A pipeline with a mix, into which mutated files are loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, originals(folder)
        self.pipe = small_pipeline()
        self.outcomes: Counter[str] = Counter()
        self.pipe.load_shira(pool()[0], "before", scale=0.7)
        self.base = {name: weight.clone() for name, weight in live_weights(small_pipeline()).items()}
        self.live = live_weights(self.pipe)
        self.mixed = {name: weight.clone() for name, weight in self.live.items()}

    def run(self, seed: int, count: int, first: int = 0) -> None:
        """Load mutated files.

        Raises:
            Difference: one did harm; it is kept in the folder.
        """
        with warnings.catch_warnings(), little_memory():
            warnings.simplefilter("ignore")
            for number in range(first, first + count):
                self._try(random.Random(f"{seed} {number}"), seed, number)

    def _try(self, rng: random.Random, seed: int, number: int) -> None:
        path, what = self.write(rng)
        try:
            self._load(path)
        except Exception as error:
            raise Difference(
                f"{type(error).__name__}: {error}\nfile {number} of seed {seed} ({what}); replay: "
                f"python -m tests.soak --file {number} --seed {seed}"
            ) from error

    def write(self, rng: random.Random) -> tuple[Path, str]:
        source = rng.choice(self.files)
        if source.is_file():
            target = self.folder / "mutant.safetensors"
            content, what = mutated(rng, source.read_bytes())
            target.write_bytes(content)
            return target, f"{source.name}: {what}"
        target = self.folder / "mutant"
        target.mkdir(exist_ok=True)
        weights, config = (
            (source / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")
        )
        what = "config"
        if rng.random() < 0.8:
            weights, what = mutated(rng, weights)
        elif rng.random() < 0.5:
            config = scrambled(rng, config)
        else:
            tree = json.loads(config)
            change(rng, tree)
            config = dumped(tree)
        (target / "adapter_model.safetensors").write_bytes(weights)
        (target / "adapter_config.json").write_bytes(config)
        return target, f"peft: {what}"

    def _load(self, path: Path) -> None:
        adapter = self._read(path) if path.is_file() else None
        try:
            self.pipe.load_shira(path, "mutant")
        except ShiraError as error:
            assert path.is_dir() or adapter is not None or isinstance(error, AdapterFormatError)
            self.outcomes[f"load_shira refuses: {type(error).__name__}"] += 1
            assert self.pipe.get_active_shira() == {"before": 0.7}
        else:
            assert path.is_dir() or adapter is not None, "load_adapter refuses it, load_shira does not"
            self.outcomes["loads"] += 1
            if adapter is not None:
                self._assert_bits(reference.apply(self._of(adapter), {"mutant": adapter}, {"mutant": 1.0}))
            self.pipe.delete_shira("mutant")
            self._assert_bits(self.base)
            self.pipe.set_shira("before", 0.7)
        assert list(self.pipe.list_shira()) == ["before"]
        self._assert_bits(self.mixed)

    def _of(self, adapter: ShiraAdapter) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self.base.items() if name in adapter.deltas}

    def _read(self, path: Path) -> ShiraAdapter | None:
        try:
            adapter = load_adapter(path)
        except AdapterFormatError:
            return None
        assert_valid(adapter)
        return adapter

    def _assert_bits(self, expected: dict[str, torch.Tensor]) -> None:
        wrong = [name for name in expected if not torch.equal(self.live[name], expected[name])]
        assert not wrong, f"changed: {wrong}"


def assert_valid(adapter: ShiraAdapter) -> None:
    """By the words of the format, and with none of the library's checks."""
    assert adapter.deltas
    for delta in adapter.deltas.values():
        indices = delta.indices.long().tolist()
        size = 1
        for length in delta.shape:
            size *= length
        assert indices == sorted(set(indices))
        assert not indices or (indices[0] >= 0 and indices[-1] < size)
        assert delta.values.shape == (len(indices),)
        assert delta.values.dtype in (torch.float32, torch.float16, torch.bfloat16)
        assert torch.isfinite(delta.values).all()


@contextmanager
def little_memory(room: int = _ROOM) -> Iterator[None]:
    """Make an allocation of more than ``room`` bytes a MemoryError or a RuntimeError; on Linux."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
