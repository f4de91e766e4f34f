"""A training step of each way to adapt a UNet: time, peak memory, and what data parallel would send.

python -m benchmarks.scripts.training [--toy] [--models "SD 1.5"] [--only lora "shira rand"] [--out FILE]

Weights are random and bfloat16, inputs are random, AdamW; gradients are clipped, as in diffusers' scripts. A step is
forward, backward, clipping, the optimizer and, for SHiRA, writing the weights. The methods:

* frozen: the floor. Forward and backward with all weights frozen; only the noisy latents require a gradient, so
  activations' gradients flow through every layer down to the input, and there are no weight gradients, no optimizer.
* shira rand, shira struct: ``SparseTuner`` on the targets at a density; deltas and AdamW in float32; "recompute":
  with its option of that name.
* lora: PEFT LoRA on the same targets (``unet.add_adapter``), its weights and AdamW in float32.
* peft shira: PEFT's own SHiRA on the same targets with as many entries as its integer rank allows, in float32.
* full: all weights, in float32 under autocast, as in diffusers' ``train_text_to_image.py``.

Peak memory is ``torch.cuda.max_memory_allocated`` over all steps, set-up left out. Weights are checked after timing.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks import rivals
from benchmarks.measure import Run, free, options, timed
from benchmarks.models import LATENTS, RANK, TOY, UNETS, inputs_of
from shira_diffusers import build_masks
from shira_diffusers.training.tuner import SparseTuner
from shira_diffusers.weights.scatter import gather
from shira_diffusers.weights.targets import PRESETS, select

TARGETS = "attention+ff"
SECONDS = {"cuda": 360, "cpu": 360}
MASKS: dict[str, dict[str, Tensor]] = {}
"""Of the current model, by family: all cases train the same entries."""


Inputs = Callable[[int], dict[str, Any]]
"""``inputs(batch)``: what a model is called with, latents first."""


class Case(NamedTuple):
    """What is measured: one row of the results."""

    model: str
    batch: int
    checkpointing: bool
    autocast: bool
    method: str


@dataclass
class Trained:
    """How a method takes part in a step, and how it is checked afterwards."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    written: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None
    latents_require_grad: bool = False
    adamw: Any = torch.optim.AdamW

    @property
    def values(self) -> int:
        """How many values are trained."""
        return sum(parameter.numel() for parameter in self.parameters)


def main() -> None:
    args = parse()
    run = Run("training", args, per_device=False, targets=TARGETS, density=args.density, lora_rank=RANK)
    for model in args.models:
        unet = make_unet(model, args)
        inputs = partial(inputs_of, unet, model, 8 if args.toy else LATENTS[model])
        for case in cases(model, args):
            run.case(partial(attempt, unet, inputs, case, args), **case._asdict())
        del unet, inputs
        MASKS.clear()
        free()
    compare(run.rows)
    print(run.write().read_text())
    sys.exit(any("failed" in row for row in run.rows))


def parse() -> argparse.Namespace:
    parser = options(__doc__, SECONDS)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--autocast", choices=("on", "off", "both"), default="both", help="off: at batch 1 only")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3)
    args = parser.parse_args()
    args.device = "cpu" if args.toy else "cuda"
    return args


def cases(model: str, args: argparse.Namespace) -> Iterator[Case]:
    """Every case of a model, those that can be left out last; without autocast at the first batch size only."""
    main, rest = ([method for method in args.only if (method in LAST) == last] for last in (False, True))
    settings = list(product(args.batch, (False, True)))
    if args.autocast != "off":
        yield from (Case(model, batch, saving, True, method) for batch, saving in settings for method in main)
    if args.autocast != "on":
        yield from (Case(model, batch, saving, False, method) for batch, saving in settings[:2] for method in main)
    if args.autocast != "off":
        yield from (Case(model, batch, saving, True, method) for batch, saving in settings for method in rest)


def make_unet(model: str, args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    with torch.device(args.device):
        unet: Any = UNet2DConditionModel(**(TOY if args.toy else UNETS)[model])
    return unet.to(torch.bfloat16).train()  # there is no dropout in it


def attempt(unet: Any, inputs: Inputs, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a case; what another library cannot do is skipped, a wrong result fails."""
    try:
        return measure(unet, inputs, case, args)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        return {"skipped": f"{type(error).__name__}: {str(error)[:300]}"}


def measure(unet: Any, make_inputs: Inputs, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    device = unet.device
    unet.requires_grad_(False)
    (unet.enable_gradient_checkpointing if case.checkpointing else unet.disable_gradient_checkpointing)()
    inputs = make_inputs(case.batch)
    latents = next(iter(inputs.values()))
    with METHODS[case.method](unet, args.density) as trained:
        optimizer = trained.adamw(trained.parameters, lr=1e-2) if trained.parameters else None
        latents.requires_grad_(trained.latents_require_grad)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=case.autocast):
                predicted = unet(**inputs).sample
            (predicted.float() - 1).square().mean().backward()
            if optimizer is None:
                latents.grad = None
                return
            nn.utils.clip_grad_norm_(trained.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            trained.written()

        free()
        before = memory(device)
        if before is not None:
            torch.cuda.reset_peak_memory_stats()
        fewer = 1 if case.batch == args.batch[0] else 2  # large steps are slow and vary less
        time_of_step = timed(step, args.repeats // fewer, -(-args.warm_up // fewer))
        figures = {
            "step": time_of_step,
            "resident_mib": before,
            "peak_mib": None if before is None else mib(torch.cuda.max_memory_allocated()),
            "trained_values": trained.values,
            "data_parallel_bytes": 4 * trained.values,
        }
        optimizer = None
        trained.check()
    return figures


@contextmanager
def frozen(unet: Any, density: float) -> Iterator[Trained]:
    before = hashes(unet.named_parameters())
    yield Trained(check=lambda: must(hashes(unet.named_parameters()) == before), latents_require_grad=True)


def shira(family: str, *, recompute: bool = False) -> Callable[[Any, float], Any]:
    @contextmanager
    def method(unet: Any, density: float) -> Iterator[Trained]:
        if family not in MASKS:  # kept on the CPU, so that the tuner's own are all that the device holds
            MASKS[family] = {name: mask.cpu() for name, mask in build_masks(unet, family, density, TARGETS).items()}
        masks = MASKS[family]
        parameters = dict(unet.named_parameters())
        outside = hashes(parameters.items(), masks)
        inside = {name: gather(parameters[name], mask).cpu() for name, mask in masks.items()}

        def check() -> None:
            must(hashes(parameters.items(), masks) == outside)
            moved = sum(int((gather(parameters[n], masks[n]).cpu() != base).sum()) for n, base in inside.items())
            must(moved > 0.9 * tuner.deltas.numel())

        with SparseTuner(unet, masks, recompute=recompute) as tuner:
            yield Trained([tuner.deltas], tuner.apply, check)
        must(all(torch.equal(gather(parameters[n], masks[n]).cpu(), base) for n, base in inside.items()))

    return method


def lora(rank: int) -> Callable[[Any, float], Any]:
    @contextmanager
    def method(unet: Any, density: float) -> Iterator[Trained]:
        layers = [name.removesuffix(".weight") for name in select(unet, TARGETS)]
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers)
        with peft_adapter(unet, config) as trained:
            yield trained

    return method


@contextmanager
def peft_shira(unet: Any, density: float) -> Iterator[Trained]:
    config = rivals.shira_config(select(unet, TARGETS).values(), density, list(PRESETS[TARGETS]))
    with peft_adapter(unet, config) as trained:
        yield trained


@contextmanager
def peft_adapter(unet: Any, config: Any) -> Iterator[Trained]:
    targets = select(unet, TARGETS).keys()
    before = hashes(unet.named_parameters())
    unet.add_adapter(config)
    try:
        own = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        for parameter in own.values():
            parameter.data = parameter.data.float()
        start = hashes(own.items())
        adapted = {f"{name.partition('.lora_A')[0].partition('.shira_weight')[0]}.weight" for name in own}
        must(targets <= adapted)

        def check() -> None:
            now = hashes(own.items())
            must(sum(now[name] != start[name] for name in own) > 0.9 * len(own))  # nothing reads one layer of SD3

        yield Trained(list(own.values()), check=check)
    finally:
        rivals.detach_peft(unet)
    must(hashes(unet.named_parameters()) == before)


@contextmanager
def full(unet: Any, density: float) -> Iterator[Trained]:
    start = hashes(unet.named_parameters())
    before = {name: parameter.detach().cpu() for name, parameter in unet.named_parameters()}
    unet.float().requires_grad_(True)
    try:

        def check() -> None:
            now = hashes(unet.named_parameters())
            must(all(now[name] != start[name] for name in start))

        yield Trained(list(unet.parameters()), check=check)
    finally:
        unet.zero_grad()
        unet.to(torch.bfloat16)
        unet.load_state_dict(before, strict=False)  # the next case starts from the same weights
    must(hashes(unet.named_parameters()) == start)


METHODS: dict[str, Callable[[Any, float], Any]] = {
    "frozen": frozen,
    "shira rand": shira("rand"),
    "shira rand recompute": shira("rand", recompute=True),
    "shira struct": shira("struct"),
    "lora": lora(RANK),
    "peft shira": peft_shira,
    "full": full,
}


LAST = ("peft shira", "full")


def hashes(named: Any, without: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """A number for the bits of each parameter and their places, entries of a mask left out."""
    numbers = {}
    for name, parameter in named:
        bits = parameter.detach().flatten().view(torch.int16 if parameter.dtype.itemsize == 2 else torch.int32).long()
        if without and name in without:
            bits = bits.index_fill(0, without[name].to(bits.device), 0)
        places = torch.arange(bits.numel(), device=bits.device) % 65_521
        numbers[name] = (bits * (places + 1)).sum()
    return {name: int(number) for name, number in numbers.items()}


def must(holds: bool) -> None:
    """Results of a step that went wrong are worth nothing: stop."""
    if not holds:
        raise AssertionError("after the steps the weights are not as they should be")


def memory(device: torch.device) -> float | None:
    return mib(torch.cuda.memory_allocated()) if device.type == "cuda" else None


def mib(size: int) -> float:
    return round(size / 2**20, 1)


def compare(rows: list[dict[str, Any]]) -> None:
    """Add each row's ratios to LoRA and to the frozen backbone of the same setting."""
    settings = ("model", "batch", "checkpointing", "autocast")
    measured = {tuple(row[name] for name in (*settings, "method")): row for row in rows if "step" in row}
    for (*setting, method), row in measured.items():
        for other in ("lora", "frozen"):
            reference = measured.get((*setting, other))
            if reference is not None and method != other:
                row |= compared(row, reference, other)


def compared(row: dict[str, Any], reference: dict[str, Any], name: str) -> dict[str, Any]:
    ratios = {f"time_over_{name}": round(row["step"]["median_ms"] / reference["step"]["median_ms"], 3)}
    if row["peak_mib"] is not None:
        ratios[f"peak_over_{name}"] = round(row["peak_mib"] / reference["peak_mib"], 3)
        ratios[f"peak_minus_{name}_mib"] = round(row["peak_mib"] - reference["peak_mib"], 1)
    if name == "lora":
        ratios["bytes_over_lora"] = round(row["data_parallel_bytes"] / reference["data_parallel_bytes"], 4)
    return ratios


if __name__ == "__main__":
    main()
