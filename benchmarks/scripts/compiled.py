"""Check how switches work under torch.compile: graphs, recompiles, CUDA graphs captured, and whether results follow.

A part of ``inference.py`` beside it. A UNet is compiled in place (``whole``) or each kind of transformer block alone
(``regional``, diffusers' ``compile_repeated_blocks``) and called after each of 100 moves: to the other adapter, or to
another strength of the same. ``graphs`` and ``captures`` (CUDA graphs, wherever ``CUDAGraph.capture_begin`` is called)
count those of the first calls, ``recompiles`` and ``recaptures`` those that the moves added. After each move the same
UNet runs without its compiled code: ``error`` is the largest relative distance of the two results, ``change`` the
smallest between one move's result and the next's; a stale graph would make the first as large as the second.
``SD 1.5 small`` has two of SD 1.5's four levels and one layer a block, and compiles in less time.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks import rivals
from benchmarks.measure import Run, timed
from benchmarks.models import UNETS, add_pair, inputs_of, latents_of, make_pipe

DENSITY = 0.02
FIRST_CALLS = 4
LORAS = ("lora0", "lora1")
SMALL = "SD 1.5 small"
CONFIGS: dict[str, dict[str, Any]] = {
    SMALL: {
        **UNETS["SD 1.5"],
        "block_out_channels": (320, 640),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


class Case(NamedTuple):
    """What is compiled, and how."""

    model: str
    compiled: str
    mode: str
    method: str = "shira"
    switches: int = 100


CASES = {
    "cuda": (
        Case(SMALL, "whole", "reduce-overhead"),
        Case("SD 1.5", "regional", "default"),
        Case("SD 1.5", "whole", "default"),
        Case("SD 1.5", "whole", "reduce-overhead"),
        # each of a LoRA's switches compiles anew
        Case(SMALL, "whole", "default", "lora set_adapters", 4),
    ),
    "cpu": (
        Case(SMALL, "whole", "aot_eager"),
        Case(SMALL, "regional", "aot_eager"),
        Case(SMALL, "whole", "aot_eager", "lora set_adapters", 4),
    ),
}
TOY_CASES = tuple(Case("SD 1.5", how, "aot_eager", switches=10) for how in ("whole", "regional"))


def run_cases(run: Run, args: argparse.Namespace) -> None:
    for case in TOY_CASES if args.toy else CASES[args.device]:
        run.case(lambda case=case: measure(case, args), **case._asdict())


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    pipe = make_pipe(case.model, args, config=None if args.toy else CONFIGS.get(case.model))
    latents = latents_of("SD 1.5", args) if args.device == "cuda" else 8
    inputs = inputs_of(pipe.unet, "SD 1.5", latents)
    try:
        if case.method == "shira":
            add_pair(pipe, DENSITY)
            figures = moved(pipe, inputs, case, lambda name, scale: pipe.set_shira(name, scale), ("a", "b"))
        else:
            with rivals.two_loras(pipe):
                figures = moved(pipe, inputs, case, lambda name, scale: pipe.set_adapters(name, scale), LORAS)
        return {"latents": latents, **figures}
    finally:
        torch._dynamo.reset()


@torch.inference_mode()
def moved(
    pipe: Any, inputs: dict[str, Any], case: Case, switch: Callable[[str, float], None], names: tuple[str, str]
) -> dict[str, Any]:
    def call() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return pipe.unet(**inputs).sample

    def move(number: int) -> None:  # another strength, another adapter, another strength, ...
        switch(names[number // 2 % 2], 0.5 + number % 2 * 0.5 + number * 0.002)

    with captures() as captured:
        move(0)
        compile_unet(pipe.unet, case)
        began = time.perf_counter()
        for _ in range(FIRST_CALLS):
            call()
        first_calls = time.perf_counter() - began
        graphs, recorded = counters["stats"]["unique_graphs"], captured["captures"]
        last, error, change = eager(call), 0.0, float("inf")
        for number in range(1, case.switches + 1):
            move(number)
            result, expected = call().float().clone(), eager(call)
            off, moved_by = distance(result, expected), distance(last, expected)
            error, change, last = max(error, off), min(change, moved_by), expected
            assert off < moved_by / 2, (
                f"move {number} does not reach the compiled UNet: {off:g} off, {moved_by:g} moved"
            )
        figures = {
            "graphs": graphs,
            "recompiles": counters["stats"]["unique_graphs"] - graphs,
            "captures": recorded,
            "recaptures": captured["captures"] - recorded,
        }
    if case.mode == "reduce-overhead":
        assert recorded, "no CUDA graph was captured"
    more = {"error": round(error, 6), "change": round(change, 6), "first_calls_s": round(first_calls, 1)}
    return {**figures, **more, "call": timed(call, 20 if pipe.unet.device.type == "cuda" else 3, 1)}


def compile_unet(unet: Any, case: Case) -> None:
    settings = {"backend": case.mode} if case.mode == "aot_eager" else {"mode": case.mode}
    (unet.compile if case.compiled == "whole" else unet.compile_repeated_blocks)(**settings)


def eager(call: Callable[[], Tensor]) -> Tensor:
    """What the same UNet computes without its compiled code."""
    with torch.compiler.set_stance("force_eager"):
        return call().float().clone()


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the other's length."""
    return ((one - other).norm() / other.norm()).item()


@contextmanager
def captures() -> Iterator[Counter[str]]:
    """Count the captures of CUDA graphs, by whomever."""
    counted: Counter[str] = Counter()
    original: Any = torch.cuda.CUDAGraph.capture_begin

    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted["captures"] += 1
        return original(self, *args, **kwargs)

    graph: Any = torch.cuda.CUDAGraph
    graph.capture_begin = capture_begin
    try:
        yield counted
    finally:
        graph.capture_begin = original
