"""One UNet call after a switch, against the base, an unfused LoRA and PEFT's SHiRA; recompiles under torch.compile.

python -m benchmarks.scripts.inference [--device cpu|cuda] [--toy] [--models "SD 1.5"] [--out FILE]

``call`` and ``base``: one call at batch 1, of the adapted UNet and of the base, in pairs: one after the other, each
first in turns, so that a machine's mood meets both. ``over_base``: the median of the pairs' ratios. With SHiRA it is
the same UNet, switched to an adapter and back between the calls; with the others the base is a second UNet that shares
the weights. LoRAs have rank 64. On a CPU latents are 16 x 16 and SDXL is left out, whose calls take too long there.
What torch.compile does with 100 switches is measured by benchmarks/scripts/compiled.py, into the same file.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks import rivals
from benchmarks.measure import Run, alternate, free, nothing, options, seconds_of, spread
from benchmarks.models import RANK, add_pair, inputs_of, latents_of, make_pipe
from benchmarks.scripts import compiled
from shira_diffusers.integrations.pipelines import resident_of

DENSITY = 0.02
SECONDS = {"cuda": 420, "cpu": 200}
WARM_UP = 3


def main() -> None:
    args = options(__doc__, SECONDS).parse_args()
    run = Run("inference", args, density=DENSITY, family="rand", lora_rank=RANK)
    pairs = 2 if args.toy else 50 if args.device == "cuda" else 30
    for model in args.models if args.toy or args.device == "cuda" else args.models[:1]:
        pipe = make_pipe(model, args)
        latents = latents_of(model, args)
        inputs = inputs_of(pipe.unet, model, latents)
        for method, measure in METHODS.items():
            labels = {"model": model, "method": method, "latents": latents}
            count = pairs if method == "shira" else max(2, pairs // 3)  # the others' ratios are far from one
            run.case(lambda p=pipe, i=inputs, m=measure, n=count: m(p, i, n), **labels)
        del pipe, inputs
        free()
    compiled.run_cases(run, args)


def shira(pipe: Any, inputs: dict[str, Any], pairs: int) -> dict[str, Any]:
    """The base and two adapters, one UNet."""
    call = caller(pipe.unet, inputs)
    before = call()
    add_pair(pipe, DENSITY)
    switch = alternate(pipe.set_shira, "ab")
    try:
        figures = paired((lambda: pipe.set_shira([]), call), (switch, call), pairs)
        pipe.set_shira("a")
        assert not torch.equal(call(), before), "the adapter changes nothing"
        resident_of(pipe).clear()
        assert torch.equal(call(), before), "after removal the UNet does not compute what the base computed"
    finally:
        pipe.unload_shira()
    return figures


def lora(pipe: Any, inputs: dict[str, Any], pairs: int) -> dict[str, Any]:
    base = twin(pipe.unet)
    with rivals.two_loras(pipe, 1):
        return beside(base, pipe.unet, inputs, pairs)


def peft_shira(pipe: Any, inputs: dict[str, Any], pairs: int) -> dict[str, Any]:
    base = twin(pipe.unet)
    with rivals.peft_shira(pipe.unet, DENSITY):
        return beside(base, pipe.unet, inputs, pairs)


METHODS: dict[str, Callable[[Any, dict[str, Any], int], dict[str, Any]]] = {
    "shira": shira,
    "lora unfused": lora,
    "peft shira unmerged": peft_shira,
}


def beside(base: Any, adapted: Any, inputs: dict[str, Any], pairs: int) -> dict[str, Any]:
    calls = caller(base, inputs), caller(adapted, inputs)
    figures = paired((nothing, calls[0]), (nothing, calls[1]), pairs)
    assert not torch.equal(calls[0](), calls[1]()), "the adapter changes nothing"
    return figures


def twin(unet: Any) -> Any:
    """Another UNet of the same weights, not copied."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.requires_grad_(False).eval()


def caller(unet: Any, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def call() -> Tensor:
        return unet(**inputs).sample

    return call


Step = tuple[Callable[[], object], Callable[[], Tensor]]
"""What to do, untimed, and what to time."""


def paired(base: Step, adapted: Step, pairs: int) -> dict[str, Any]:
    taken: dict[str, list[float]] = {"base": [], "call": []}
    for number in range(WARM_UP + pairs):
        turn = [("base", base), ("call", adapted)]
        for name, (prepare, call) in turn if number % 2 else reversed(turn):
            prepare()
            taken[name].append(seconds_of(call))
    counted = {name: seconds[WARM_UP:] for name, seconds in taken.items()}
    ratios = sorted(after / before for before, after in zip(counted["base"], counted["call"], strict=True))
    low, high = (round(ratios[round(share * (pairs - 1))], 3) for share in (0.1, 0.9))
    over = {"over_base": round(statistics.median(ratios), 3), "over_base_p10": low, "over_base_p90": high}
    return {**{name: spread(seconds) for name, seconds in counted.items()}, **over}


if __name__ == "__main__":
    main()
