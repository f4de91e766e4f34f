"""An error at the k-th tensor operation of a call, for every k until the call passes.

All that torch dispatches counts as an operation; the error comes just before it, or just after.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shira_diffusers import ShiraAdapter, load_adapter, save_adapter
from tests import reference, tiny
from tests.soak.operations import live_weights

MIX: dict[str, Any] = {"a": 0.7, "b": {"unet": -0.3}}
Act = Callable[[DiffusionPipeline, Path], object]


class PowerCut(BaseException):
    """What is raised: nobody may catch it for another, as nobody may Ctrl-C."""


class FailsAt(TorchDispatchMode):
    """Raise at one operation; those that follow it, as to roll back, pass."""

    def __init__(self, at: int, after: bool) -> None:
        super().__init__()
        self.at, self.after, self.calls = at, after, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise PowerCut
        result = func(*args, **(kwargs or {}))
        if self.calls == self.at:
            raise PowerCut
        return result


class Pair(DiffusionPipeline):
    """A pipeline of two models of a few layers, made in a millisecond."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder)


def pair(dtype: torch.dtype = torch.float32) -> Pair:
    return Pair(tiny.linears(1)[:2].to(dtype), tiny.linears(2)[:1].to(dtype))


@dataclass(frozen=True)
class Bench:
    """A way to make a pipeline, and its adapters.

    Args:
        make: gives a pipeline in the same state each time, none loaded.
        adapters: by name; "a", "b" and "c" are loaded before, "c" is not active.
        files: where they are.
        folder: of the files.
    """

    make: Callable[[], DiffusionPipeline]
    adapters: dict[str, ShiraAdapter]
    files: dict[str, Path]
    folder: Path


def bench(make: Callable[[], DiffusionPipeline], folder: Path, only: tuple[str, ...] = ("",)) -> Bench:
    pipe = make()
    adapters = {name: tiny.adapter_for(pipe, seed, only=only, density=0.1) for seed, name in enumerate("abc")}
    adapters["new"] = with_probes(tiny.adapter_for(pipe, 9, only=only, dtype=torch.float16), live_weights(pipe))
    files = {name: save_adapter(its, folder / f"{name}.safetensors") for name, its in adapters.items()}
    return Bench(make, adapters, files, folder)


def with_probes(adapter: ShiraAdapter, base: dict[str, Tensor]) -> ShiraAdapter:
    """With a few values of the base, which are compared at a load."""
    probes = {
        name: base[name].flatten()[delta.indices[:2].long()].to(torch.float16) for name, delta in adapter.deltas.items()
    }
    return ShiraAdapter(adapter.deltas, adapter.metadata, probes)


@dataclass(frozen=True)
class Scenario:
    """A call, and what it leaves when it passes.

    Args:
        act: of a pipeline whose mix is ``MIX``, and a file's path.
        mix: that is active after.
        prepare: done before.
        source: the adapter whose file it is.
        swaps: whether "a" is "new" after.
        writes: the mix that is in the folder "saved" after, where a file is before.
    """

    act: Act
    mix: dict[str, Any]
    prepare: Callable[[DiffusionPipeline], object] = lambda pipe: None
    source: str = "new"
    swaps: bool = False
    writes: dict[str, Any] | None = None


SCENARIOS = {
    "load": Scenario(lambda pipe, file: pipe.load_shira(file, "new", scale=0.5), {"new": 0.5}),
    "load, not active": Scenario(lambda pipe, file: pipe.load_shira(file, "new", activate=False), MIX),
    "load in its place": Scenario(lambda pipe, file: pipe.load_shira(file, "a", hotswap=True), MIX, swaps=True),
    "set": Scenario(lambda pipe, _: pipe.set_shira({"c": 1.7, "a": 0.3}), {"c": 1.7, "a": 0.3}),
    "set, one": Scenario(lambda pipe, _: pipe.set_shira("c"), {"c": 1.0}),
    "scale": Scenario(lambda pipe, _: pipe.set_shira(MIX | {"a": 1}), MIX | {"a": 1}),
    "disable": Scenario(lambda pipe, _: pipe.disable_shira(), {}),
    "enable": Scenario(lambda pipe, _: pipe.enable_shira(), MIX, prepare=lambda pipe: pipe.disable_shira()),
    "remove": Scenario(lambda pipe, _: pipe.delete_shira(["a", "c"]), {"b": MIX["b"]}),
    "unload": Scenario(lambda pipe, _: pipe.unload_shira(), {}),
    "save": Scenario(lambda pipe, file: pipe.save_shira(file.parent / "saved", "a"), MIX, writes={"a": 1.0}),
    "save the mix": Scenario(lambda pipe, file: pipe.save_shira(file.parent / "saved"), MIX, writes=MIX),
}


def try_every(scenario: Scenario, bench: Bench, after: bool) -> int:
    """Fail at each operation in turn, in a pipeline made anew, until the call passes.

    A call that failed has changed nothing, works when it is called again, and the base returns to the bit.

    Returns:
        How many operations failed.
    """
    for at in count(1):
        pipe = bench.make()
        base = copies(pipe)
        for name in "abc":
            pipe.load_shira(bench.adapters[name], name, activate=False)
        pipe.set_shira(MIX)
        scenario.prepare(pipe)
        failed = attempt(scenario, bench, pipe, at, after)
        if failed:
            scenario.act(pipe, bench.files[scenario.source])
        assert_passed(scenario, bench, pipe, base)
        pipe.unload_shira()
        assert_bits(pipe, base)
        if not failed:
            return at - 1
    raise AssertionError


def attempt(scenario: Scenario, bench: Bench, pipe: DiffusionPipeline, at: int, after: bool) -> bool:
    """Whether a call failed; if so, nothing has changed."""
    if scenario.writes:
        save_adapter(bench.adapters["c"], bench.folder / "saved")
    bits, told = copies(pipe), said(pipe, bench.folder)
    try:
        with FailsAt(at, after), warnings.catch_warnings():
            warnings.simplefilter("error")  # such as that of another base
            scenario.act(pipe, bench.files[scenario.source])
    except PowerCut:
        assert_bits(pipe, bits)
        assert said(pipe, bench.folder) == told
        return True
    return False


def copies(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in live_weights(pipe).items()}


def said(pipe: DiffusionPipeline, folder: Path) -> tuple[object, ...]:
    """What the pipeline says of its adapters, and all files."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return pipe.get_active_shira(), pipe.list_shira(), files


def assert_bits(pipe: DiffusionPipeline, expected: dict[str, Tensor]) -> None:
    now = live_weights(pipe)
    assert now.keys() == expected.keys()
    wrong = [name for name in now if not tiny.same_bits(now[name], expected[name])]
    assert not wrong, f"{len(wrong)} weights differ: {wrong}"


def assert_passed(scenario: Scenario, bench: Bench, pipe: DiffusionPipeline, base: dict[str, Tensor]) -> None:
    held = {**bench.adapters, **({"a": bench.adapters["new"]} if scenario.swaps else {})}
    assert pipe.get_active_shira() == scenario.mix
    assert_bits(pipe, reference.apply(base, held, scenario.mix))
    if scenario.writes:
        assert [path.name for path in (bench.folder / "saved").iterdir()] == ["pytorch_shira_weights.safetensors"]
        saved = load_adapter(bench.folder / "saved")
        expected = reference.apply(base, bench.adapters, scenario.writes)
        actual = reference.apply(base, {"saved": saved}, {"saved": 1.0})
        assert all(tiny.same_bits(actual[name], expected[name]) for name in base)
