"""One weight: overwriting 1 % of it, against fusing a LoRA of rank 64 and merging PEFT's SHiRA (the paper's Figure 7).

python -m benchmarks.scripts.overwrite_vs_fuse [--device cpu|cuda] [--toy] [--out FILE]

``overwrite`` is the whole switch to an adapter in memory (``Resident.set``, with its checks and saved bits),
``kernel`` the write of ready values alone. The others are PEFT's own layers: ``merge``, then ``unmerge`` untimed.
``limit_ms``: what the switch costs at least, see ``measure.memory_limit``; ``over_limit`` how many times that it takes.
"""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks import rivals
from benchmarks.measure import DTYPES, Run, copy_figures, memory_limit, options, timed
from benchmarks.models import RANK, rand, same
from shira_diffusers import Resident, ShiraAdapter, SparseDelta, build_masks
from shira_diffusers.weights.scatter import gather
from shira_diffusers.weights.sweep_triton import access

DENSITY = 0.01


def main() -> None:
    args = options(__doc__).parse_args()
    dims = (64, 128) if args.toy else (512, 1024, 2048, 4096, 8192)
    memory = copy_figures(args.device, args.toy)
    run = Run("overwrite_vs_fuse", args, density=DENSITY, lora_rank=RANK, **memory)
    for dtype in ("float32", "float16", "bfloat16"):
        for dim in dims if dtype == "float32" or args.toy else (1024, 4096):
            case = (dim, DTYPES[dtype])
            run.case(lambda case=case: measure(*case, args, memory), dim=dim, dtype=dtype)


def measure(dim: int, dtype: torch.dtype, args: Any, memory: dict[str, float]) -> dict[str, Any]:
    torch.manual_seed(0)
    repeats = 3 if args.toy or dim > 4096 else 15
    base = torch.randn(dim, dim, dtype=dtype, device=args.device) * 0.02
    figures: dict[str, Any] = {"overwrite": switched(base, repeats), "kernel": written(base, repeats)}
    shira = rivals.shira_config([base], DENSITY, ["0"], init_weights=False)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
    figures["lora_fuse"] = merged(base, lora, repeats)
    figures["peft_shira_merge"] = merged(base, shira, repeats)
    for other in ("lora_fuse", "peft_shira_merge"):
        for ours in ("overwrite", "kernel"):
            figures[f"{other}_over_{ours}"] = round(figures[other]["median_ms"] / figures[ours]["median_ms"], 1)
    limit = memory_limit([ShiraAdapter({"0.weight": delta_of(base, 0)})], {"0.weight": base}, memory)
    return {**figures, **limit, "over_limit": round(figures["overwrite"]["median_ms"] / limit["limit_ms"], 2)}


def layer(base: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(*base.shape, bias=False, device="meta"))
    model[0].weight = nn.Parameter(base.clone(), requires_grad=False)
    return model


def delta_of(base: Tensor, seed: int) -> SparseDelta:
    mask = build_masks(layer(base), rand, DENSITY, "all", seed=seed)["0.weight"]
    return SparseDelta(mask, (torch.randn(mask.numel(), device=base.device) * 0.02).half(), tuple(base.shape))


def switched(base: Tensor, repeats: int) -> dict[str, float]:
    """From the base to the adapter, by the engine; back again untimed."""
    model, delta = layer(base), delta_of(base, 0)
    resident = Resident(model)
    resident.add(ShiraAdapter({"0.weight": delta}), "a")
    seconds = timed(lambda: resident.set({"a": 1.0}), repeats, 3, after=resident.clear)
    resident.set({"a": 1.0})
    expected = (base.float() + delta.to_dense()).to(base.dtype)
    assert same(model[0].weight, expected), "not base + delta"
    resident.clear()
    assert torch.equal(model[0].weight, base)
    return seconds


def written(base: Tensor, repeats: int) -> dict[str, float]:
    """The write alone, of values that are ready."""
    weight, delta = base.clone(), delta_of(base, 0)
    _, write = access([weight], [delta.nnz], delta.indices)
    before, values = gather(base, delta.indices), torch.randn(delta.nnz, device=base.device).to(base.dtype)
    seconds = timed(lambda: write(values), repeats)
    assert torch.equal(gather(weight, delta.indices), values)
    write(before)
    assert torch.equal(weight, base)
    return seconds


def merged(base: Tensor, config: Any, repeats: int) -> dict[str, float]:
    model = layer(base)
    tuned: Any = inject_adapter_in_model(config, model)[0]
    with torch.no_grad():
        seconds = timed(tuned.merge, repeats, 3, after=tuned.unmerge)
    assert not tuned.merged and torch.allclose(tuned.get_base_layer().weight, base, atol=0.05)
    return seconds


if __name__ == "__main__":
    main()
