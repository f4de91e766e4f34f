"""Cases under a time budget, and the models and adapters that the scripts compare; random weights throughout."""

import argparse
import gc
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import UNETS, timed, write
from benchmarks.scripts.training import LATENTS, RANK, TOY
from shira_diffusers import ShiraAdapter, SparseDelta, build_masks
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.masks.families import MaskContext
from shira_diffusers.weights.targets import select

SECONDS = {"cuda": 100, "cpu": 200}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def options(doc: str | None) -> argparse.ArgumentParser:
    """The options that all scripts share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SECONDS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=UNETS, default=list(UNETS))
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default float16 on CUDA, float32 on a CPU")
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun; default 100 or 200 (CPU)")
    parser.add_argument("--toy", action="store_true", help="tiny models, to try the code")
    parser.add_argument("--out", type=Path, help="file to write; default benchmarks/results/<name>_<device>.json")
    return parser


class Run:
    """Measures cases one after another and writes the rows after each, so that a run cut short leaves its results."""

    def __init__(self, name: str, args: argparse.Namespace, **about: Any) -> None:
        self.name, self.rows = f"{name}_{args.device}", []
        self.about = {"device": args.device, "toy": args.toy, **about}
        self.path = args.out or (Path(tempfile.gettempdir(), f"{self.name}_toy.json") if args.toy else None)
        self.until = time.monotonic() + (args.budget or SECONDS[args.device])
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()

    def case(self, measure: Callable[[], dict[str, Any]], **labels: Any) -> dict[str, Any]:
        """Measure one case, or say why not: ``skipped`` (time or memory) or ``failed``."""
        began = time.monotonic()
        if began > self.until:
            figures: dict[str, Any] = {"skipped": "the time for all cases was over"}
        else:
            figures = self._attempt(measure)
        self.rows.append({**labels, **figures, "took_s": round(time.monotonic() - began, 1)})
        print(self.rows[-1], flush=True)
        write(self.name, {**self.about, "rows": self.rows}, self.path)
        free()
        return self.rows[-1]

    def _attempt(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return measure()
        except torch.OutOfMemoryError as error:
            return {"skipped": f"out of memory: {str(error).splitlines()[0][:200]}"}
        except Exception as error:  # noqa: BLE001  other libraries' limits must not cost the other cases
            return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return DTYPES[args.dtype or ("float16" if args.device == "cuda" else "float32")]


def make_pipe(
    model: str, args: argparse.Namespace, dtype: torch.dtype | None = None, config: dict[str, Any] | None = None
) -> Any:
    """A pipeline of nothing but a UNet and a scheduler, which is all that loading and switching need."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**(config or (TOY if args.toy else UNETS)[model])).to(dtype or dtype_of(args))
    fill(unet.to_empty(device=args.device).requires_grad_(False).eval())
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": DDIMScheduler()}
    if model == "SDXL":
        return StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights at the speed of a copy: normal values, scaled by the inputs of a layer, repeat every 2^20."""
    device = next(model.parameters()).device
    pool = torch.randn(2**20 + 7, generator=torch.Generator(device).manual_seed(0), device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("weight")))  # of norms
            continue
        values = (pool * parameter[0].numel() ** -0.5).to(parameter.dtype)
        for part in parameter.view(-1).split(pool.numel()):
            part.copy_(values[: part.numel()])


def rand(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """As the family ``rand``, drawn as gaps: sorted at once, about ``count`` entries."""
    uniform = torch.rand(count, generator=context.generator).clamp_min_(1e-9)
    gaps = (uniform.log_() / math.log1p(-count / weight.numel())).long()
    at = gaps.cumsum(0) + torch.arange(count)
    return at[at < weight.numel()].to(weight.device)


def shira_adapter(unet: nn.Module, family: str, density: float, seed: int, masks: Any = None) -> ShiraAdapter:
    """A float16 adapter of random values for attention and feed-forward; ``masks`` spares choosing them again."""
    models, weights = {"unet": unet}, select({"unet": unet})
    masks = masks or build_masks(models, rand if family == "rand" else family, density, seed=seed)
    deltas = {}
    for name, mask in masks.items():
        generator = torch.Generator(mask.device).manual_seed(seed)
        values = torch.randn(mask.numel(), generator=generator, device=mask.device) * 0.02
        deltas[name] = SparseDelta(mask, values.half(), tuple(weights[name].shape))
    return ShiraAdapter(deltas)


def add_pair(pipe: Any, density: float) -> None:
    """Adapters ``a`` and ``b`` of random masks, not active."""
    for seed, name in enumerate(("a", "b")):
        resident_of(pipe).add(shira_adapter(pipe.unet, "rand", density, seed), name)


def lora_state(unet: nn.Module, seed: int, rank: int = RANK) -> dict[str, Tensor]:
    """A LoRA of the same weights on the CPU, in their dtype, with diffusers' keys; drawn where the weights are."""
    device = next(unet.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, weight in select(unet).items():
        for matrix, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
            key = f"unet.{name.removesuffix('.weight')}.lora_{matrix}.weight"
            drawn = torch.randn(shape, generator=generator, device=device)
            state[key] = (drawn * 0.02).to(weight.dtype).cpu()
    return state


def latents_of(model: str, args: argparse.Namespace) -> int:
    """Side of the latents that a UNet is called with: those of its pictures, fewer on a CPU."""
    return 8 if args.toy else 16 if args.device == "cpu" else LATENTS[model]


def inputs_of(unet: Any, model: str, latents: int) -> dict[str, Any]:
    """What a UNet is called with, at batch 1, of noise."""
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


def copies(unet: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights to compare with: all of them where they take less than 6 GB, else every fourth."""
    weights = select({"unet": unet})
    every = 1 if sum(w.nbytes for w in weights.values()) < 6e9 else 4
    return {name: weight.clone() for name, weight in list(weights.items())[::every]}


def require_base(unet: nn.Module, base: dict[str, Tensor]) -> None:
    """Assert that weights have their bits before."""
    now = select({"unet": unet})
    assert all(torch.equal(now[name], weight) for name, weight in base.items()), "the base is not back"


def require_active(unet: nn.Module, base: dict[str, Tensor], mix: Iterable[tuple[ShiraAdapter, float]]) -> None:
    """Assert that weights are what dense arithmetic gives; see ``same``."""
    now, adapters = select({"unet": unet}), list(mix)
    for name, weight in base.items():
        total = torch.zeros(weight.shape, device=weight.device)
        for adapter, scale in adapters:
            total += scale * adapter.deltas[name].to_dense().to(weight.device)
        expected = (weight.float() + total).to(weight.dtype)
        assert same(now[name], expected), f"{name} is not base + scale * delta"


def same(weight: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit; on CUDA up to the last bit, since kernels there may fuse multiply and add."""
    if weight.is_cuda:
        return torch.allclose(weight, expected, rtol=torch.finfo(weight.dtype).eps, atol=1e-7)
    return torch.equal(weight, expected)


def device_ms(action: Callable[[], object], repeats: int = 5) -> float | None:
    """Time that kernels and copies run on the GPU, their sum by ``torch.profiler``, for one action; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    action()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            action()
        torch.cuda.synchronize()
    kernels = (event.self_device_time_total for event in profiled.key_averages())
    return round(sum(kernels) / repeats / 1000, 4)


def copy_bandwidth(device: str, toy: bool) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(2**20 if toy else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (timed(lambda: target.copy_(source), 10)["median_ms"] / 1000)


@cache
def line_bytes(device: str) -> int:
    """The fewest bytes that memory moves: a cache line; on a GPU a sector of 32 or two, which is measured."""
    if device == "cpu":
        return 64
    memory = torch.zeros(2**28, dtype=torch.int16, device=device)
    apart = {step: timed(lambda step=step: memory[:: step // 2].add_(1), 10)["median_ms"] for step in (32, 64)}
    return 64 if apart[64] > 0.9 * apart[32] else 32  # half the values, in the same time


def touched(adapters: list[ShiraAdapter], weights: dict[str, Tensor], device: str) -> int:
    """Bytes of the lines (see ``line_bytes``) of the weights that hold an entry of any of the adapters."""
    lines, line = 0, line_bytes(device)
    for name in adapters[0].deltas:
        held = torch.cat([adapter.deltas[name].indices for adapter in adapters]).long()
        lines += (held * weights[name].element_size() // line).unique().numel()
    return lines * line


def memory_limit(adapters: list[ShiraAdapter], weights: dict[str, Tensor], bandwidth: float) -> dict[str, float]:
    """What a write of the union of adapters costs at least, by the bandwidth of a copy.

    ``bytes``: lines of the weights that hold entries, read and written, the bits saved, and the adapters' own bytes.
    """
    first = next(iter(weights.values()))
    lines = touched(adapters, weights, first.device.type)
    own = sum(delta.nbytes for adapter in adapters for delta in adapter.deltas.values())
    saved = sum(adapter.nnz for adapter in adapters) * first.dtype.itemsize
    least = 2 * lines + own + saved
    return {"bytes": least, "limit_ms": round(1000 * least / bandwidth, 5)}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
