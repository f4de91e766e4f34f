"""One UNet call after a switch, against the base, an unfused LoRA and PEFT's SHiRA; recompiles after 100 switches.

python -m benchmarks.inference [--device cpu|cuda] [--toy] [--models "SD 1.5"] [--out FILE]

``call``: one call of the UNet at batch 1. ``over_base``: its median over that of the base, measured in the same case in
turns. ``graphs``: those that torch.compile made for the first call; ``recompiles``: those that 100 switches and scales
added; ``recaptures``: CUDA graphs recorded by them (``reduce-overhead`` only). LoRAs have rank 64.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks import rivals
from benchmarks.common import spread, timed
from benchmarks.harness import Run, make_pipe, options, shira_adapter
from benchmarks.training import LATENTS, RANK
from shira_diffusers.pipeline import resident_of

DENSITY = 0.02


def main() -> None:
    args = options(__doc__).parse_args()
    run = Run("inference", args, density=DENSITY, family="rand", lora_rank=RANK)
    repeats = 20 if args.device == "cuda" else 1
    # one call of SDXL takes most of a minute on a CPU
    models = args.models if args.toy or args.device == "cuda" else [m for m in args.models if m != "SDXL"]
    for model in models:
        pipe = make_pipe(model, args)
        inputs = inputs_of(pipe.unet, model, 8 if args.toy else LATENTS[model])
        for method, adapted in METHODS.items():
            run.case(lambda p=pipe, i=inputs, a=adapted: eager(p, i, a, repeats), model=model, method=method)
        del pipe
    backends: list[dict[str, Any]] = (
        [{}, {"mode": "reduce-overhead"}]
        if args.device == "cuda"
        else [{"backend": "eager" if args.toy else "aot_eager"}]
    )
    for settings, method in itertools.product(backends, ("shira",) if args.toy else ("shira", "lora set_adapters")):
        run.case(
            lambda s=settings, m=method: compiled(args, s, m), model=args.models[0], method=method, compile=settings
        )


def inputs_of(unet: Any, model: str, latents: int) -> dict[str, Any]:
    generator = torch.Generator(unet.device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=unet.device).to(unet.dtype)

    config = unet.config
    inputs: dict[str, Any] = {
        "sample": noise(1, 4, latents, latents),
        "timestep": torch.full((1,), 500, device=unet.device),
        "encoder_hidden_states": noise(1, 77, config.cross_attention_dim),
    }
    if model == "SDXL":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.full((1, 6), 8.0 * latents, device=unet.device)
        inputs["added_cond_kwargs"] = {"text_embeds": noise(1, pooled), "time_ids": sizes}
    return inputs


def shira(pipe: Any, call: Callable[[], Any]) -> Any:
    """Call the UNet after a switch to another adapter."""
    try:
        add(pipe)
        pipe.set_shira("a")
        pipe.set_shira("b")
        return call()
    finally:
        pipe.unload_shira()


def add(pipe: Any) -> None:
    for seed, name in enumerate(("a", "b")):
        resident_of(pipe).add(shira_adapter(pipe.unet, "rand", DENSITY, seed), name)


def lora(pipe: Any, call: Callable[[], Any]) -> Any:
    with rivals.two_loras(pipe, 1):
        return call()


def peft_shira(pipe: Any, call: Callable[[], Any]) -> Any:
    with rivals.peft_shira(pipe.unet, DENSITY):
        return call()


METHODS: dict[str, Callable[[Any, Callable[[], Any]], Any]] = {
    "shira": shira,
    "lora unfused": lora,
    "peft shira unmerged": peft_shira,
}


def eager(pipe: Any, inputs: dict[str, Any], adapted: Callable[..., Any], repeats: int) -> dict[str, Any]:
    """Rounds of the base and of the adapted UNet in turns, so that a machine's mood meets both."""

    @torch.inference_mode()
    def call() -> Tensor:
        return pipe.unet(**inputs).sample

    rounds: dict[str, list[float]] = {"base": [], "call": []}
    before = call()
    for _ in range(3):
        for name, run in (("base", lambda: timed(call, repeats, 1)), ("call", lambda: measured(call, before, repeats))):
            figures = run() if name == "base" else adapted(pipe, run)
            rounds[name].append(figures["median_ms"] / 1000)
    if adapted is shira:
        assert torch.equal(call(), before), "after removal the UNet does not compute what the base computed"
    base, after = spread(rounds["base"]), spread(rounds["call"])
    return {"base": base, "call": after, "over_base": round(after["median_ms"] / base["median_ms"], 3)}


def measured(call: Callable[[], Tensor], before: Tensor, repeats: int) -> dict[str, float]:
    assert not torch.equal(call(), before), "the adapter changes nothing"
    return timed(call, repeats, 1)


def compiled(args: Any, settings: dict[str, Any], method: str) -> dict[str, Any]:
    """Compile the UNet in place, switch and scale 100 times with a call after each, and count the graphs."""
    torch._dynamo.reset()
    counters.clear()
    pipe = make_pipe(args.models[0], args)
    inputs = inputs_of(pipe.unet, args.models[0], 8 if args.toy else LATENTS[args.models[0]])
    quick, slow = (100, 10) if args.device == "cuda" else (3 if args.toy else 20, 2)
    times = quick if method == "shira" else slow  # a LoRA's switches recompile, each taking as long as the first call
    if method == "shira":
        add(pipe)
        return counted(pipe, inputs, settings, lambda n: pipe.set_shira("ab"[n % 2], 0.5 + 0.01 * n), times)
    with rivals.two_loras(pipe):
        names = ("lora0", "lora1")
        return counted(pipe, inputs, settings, lambda n: pipe.set_adapters([names[n % 2]], [0.5 + 0.01 * n]), times)


@torch.inference_mode()
def counted(
    pipe: Any, inputs: dict[str, Any], settings: dict[str, Any], switch: Callable[[int], None], times: int
) -> dict[str, Any]:
    pipe.unet.compile(**settings)
    switch(0)
    for _ in range(3):
        pipe.unet(**inputs)
    graphs, captures = counters["stats"]["unique_graphs"], recorded(settings)
    outputs = []
    for number in range(1, times + 1):
        switch(number)
        outputs.append(pipe.unet(**inputs).sample.float().abs().sum().item())
    assert len(set(outputs)) == times, "switches do not reach the compiled UNet"
    again = recorded(settings)
    return {
        "switches": times,
        "graphs": graphs,
        "recompiles": counters["stats"]["unique_graphs"] - graphs,
        "recaptures": None if captures is None or again is None else again - captures - 1,
        "call": timed(lambda: pipe.unet(**inputs), 3, 0),
    }


def recorded(settings: dict[str, Any]) -> int | None:
    """CUDA graphs recorded so far, by torch's own counter, which reading advances by one."""
    if settings.get("mode") != "reduce-overhead":
        return None
    from torch._inductor.cudagraph_trees import get_manager

    manager: Any = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return None if manager is None else next(manager.graph_counter)


if __name__ == "__main__":
    main()
