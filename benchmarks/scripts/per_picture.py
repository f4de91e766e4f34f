"""A step of four pictures with four adapters, against one adapter for all four, and against four calls; and int8 bases.

python -m benchmarks.scripts.per_picture [--device cpu|cuda] [--toy] [--models "SD 1.5"] [--out FILE]

A step is one UNet call with guidance, so of twice as many rows as pictures. ``per_picture``: each picture has an
adapter of its own, beside the weights; ``one_active``: all have one, in the weights; ``four_calls``: one call per
picture, the sum without the switches between them. ``begin``: once per generation, before its first step.
On the int8 base of optimum-quanto ``one_active`` runs beside the weights and ``base`` has no adapter. On a CPU latents
are 16 x 16 and SDXL is left out.
"""

import statistics
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Run, free, options, seconds_of, spread
from benchmarks.models import inputs_of, latents_of, make_pipe, shira_adapter
from shira_diffusers.integrations.per_picture import KEY, adapters_per_picture
from shira_diffusers.integrations.pipelines import resident_of

DENSITY = 0.01
SECONDS = {"cuda": 200, "cpu": 300}
NAMES = "abcd"
Taken = dict[str, list[float]]


def main() -> None:
    args = options(__doc__, SECONDS).parse_args()
    run = Run("per_picture", args, density=DENSITY, family="rand", pictures=len(NAMES))
    rounds = 2 if args.toy else 30 if args.device == "cuda" else 3
    for model in args.models if args.toy or args.device == "cuda" else args.models[:1]:
        pipe, latents = make_pipe(model, args), latents_of(model, args)
        inputs = inputs_of(pipe.unet, model, latents, batch=2 * len(NAMES))
        for method, measure in (("plain base", four_adapters), ("int8 base", quantized)):
            run.case(partial(measure, pipe, inputs, rounds), model=model, method=method, latents=latents)
        del pipe, inputs
        free()


def four_adapters(pipe: Any, inputs: dict[str, Any], rounds: int) -> dict[str, Any]:
    for seed, name in enumerate(NAMES):
        resident_of(pipe).add(shira_adapter(pipe.unet, "rand", DENSITY, seed), name)
    asked = {"prompt": [""] * len(NAMES), "cross_attention_kwargs": {KEY: list(NAMES)}}
    taken: Taken = defaultdict(list)
    try:
        for _ in range(rounds + 1):
            with ExitStack() as drawing:
                begin = partial(adapters_per_picture, resident_of(pipe), asked, "cross_attention_kwargs")
                taken["begin"].append(seconds_of(lambda begin=begin: drawing.enter_context(begin())))
                together = call(pipe.unet, inputs)
                taken["per_picture"].append(seconds_of(partial(call, pipe.unet, inputs)))
            pipe.set_shira("a")
            taken["one_active"].append(seconds_of(partial(call, pipe.unet, inputs)))
            taken["four_calls"].append(0.0)
            for number, name in enumerate(NAMES):
                pipe.set_shira(name)
                own = rows_of(inputs, number)
                alone: list[Tensor] = []
                taken["four_calls"][-1] += seconds_of(lambda own=own, to=alone: to.append(call(pipe.unet, own)))
                require_close(together[number :: len(NAMES)], alone[0])
    finally:
        pipe.unload_shira()
    return figures(taken, {"per_picture": "one_active", "four_calls": "per_picture"})


def quantized(pipe: Any, inputs: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The last of a pipeline: its UNet stays quantized."""
    from optimum.quanto import freeze, qint8, quantize

    adapter = shira_adapter(pipe.unet, "rand", DENSITY, 0)
    quantize(pipe.unet, weights=qint8)
    freeze(pipe.unet)
    resident_of(pipe).add(adapter, "a")
    taken: Taken = defaultdict(list)
    for _ in range(rounds + 1):
        for key, mix in (("base", []), ("one_active", ["a"])):
            pipe.set_shira(mix)
            call(pipe.unet, inputs)
            taken[key].append(seconds_of(partial(call, pipe.unet, inputs)))
    return figures(taken, {"one_active": "base"})


def figures(taken: Taken, ratios: dict[str, str]) -> dict[str, Any]:
    """Spreads without the first round, and the median ratio over the rounds of each pair."""
    kept = {name: seconds[1:] for name, seconds in taken.items()}
    over = {
        f"{one}_by_{other}": round(statistics.median(a / b for a, b in zip(kept[one], kept[other], strict=True)), 2)
        for one, other in ratios.items()
    }
    return {name: spread(seconds) for name, seconds in kept.items()} | over


def rows_of(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    """The rows of one picture: of both halves that guidance makes of a batch."""
    own = slice(number, None, len(NAMES))
    return {n: rows_of(x, number) if isinstance(x, dict) else x[own] for n, x in inputs.items()}


@torch.inference_mode()
def call(unet: Any, inputs: dict[str, Any]) -> Tensor:
    return unet(**inputs).sample


def require_close(one: Tensor, other: Tensor) -> None:
    error = float((one - other).abs().max() / other.abs().max())
    assert error < torch.finfo(one.dtype).eps ** 0.5, f"a picture differs from the one alone by {error:.2g}"


if __name__ == "__main__":
    main()
