"""Mask families: which entries of each weight an adapter may change.

P below is "Sparse High Rank Adapters", https://arxiv.org/abs/2406.13175 (section 3.1 and appendix B).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import check_indices
from shira_diffusers.errors import AdapterMismatchError, ShiraError, counted, listing, verb
from shira_diffusers.masks.avoided import avoided_entries
from shira_diffusers.masks.calibration import Calibration, gradient_magnitudes
from shira_diffusers.masks.sparsify import require_density
from shira_diffusers.masks.top_entries import bits_of, counts_by_bin, cutoff, top_indices
from shira_diffusers.seeds import seeded
from shira_diffusers.weights.targets import DEFAULT_TARGETS, Targets, require_modules, select
from shira_diffusers.weights.tiles import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class MaskContext:
    """What a mask family may use beyond the weight.

    Args:
        generator: a CPU generator seeded by (seed, parameter name); the only source of randomness to use.
        blocked: bool ``(numel,)`` on the weight's device, True where an entry must not be used; None if all are free.
        gradient: float32 of the weight's shape, the gradient's magnitude summed over the calibration set (for
            ``grad_mean`` the magnitude of its sum); None without calibration.
    """

    generator: torch.Generator
    blocked: Tensor | None
    gradient: Tensor | None


MaskFamily = Callable[[Tensor, int, MaskContext], Tensor]
"""``family(weight, count, context) -> int64 (nnz,)``: flat row-major indices, in any order, about ``count`` of them."""


def _top(score: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose the ``count`` entries of the highest score, ties to the lowest index."""
    flat = score.flatten().float()
    if context.blocked is not None:
        flat = flat.masked_fill(context.blocked[: flat.numel()], -torch.inf)
    return top_indices(flat, count)


def rand(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose exactly ``count`` entries of a weight ``(out, ...)`` uniformly at random (P 3.1, SHiRA-Rand)."""
    return _draw(weight.numel(), count, context).to(weight.device)


def _draw(numel: int, count: int, context: MaskContext) -> Tensor:
    """Draw ``count`` distinct free positions below ``numel``, uniformly; in O(count) where few are blocked."""
    blocked = None if context.blocked is None else context.blocked.cpu()
    free = numel if blocked is None else numel - int(blocked.sum())
    if count * 4 > free:  # rejection would run long: shuffle what is free
        pool = torch.arange(numel, device="cpu") if blocked is None else (~blocked).nonzero().flatten()
        return pool[torch.randperm(pool.numel(), generator=context.generator, device="cpu")[:count]]
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while drawn.numel() < count:
        # of count draws from 4 * count positions or more, up to an eighth are duplicates
        more = torch.randint(numel, (count + count // 8 + 16,), generator=context.generator, device="cpu")
        if blocked is not None:
            more = more[~blocked[more]]
        drawn = torch.cat([drawn, more]).unique()
    return drawn[torch.randperm(drawn.numel(), generator=context.generator, device="cpu")[:count]]


def _magnitude(weight: Tensor, context: MaskContext) -> Tensor:
    return weight.float().abs()


def _gradient(weight: Tensor, context: MaskContext) -> Tensor:
    if context.gradient is None:
        raise ShiraError("the grad, grad_mean and snip masks need calibration=, got None: pass losses or gradients")
    return context.gradient.to(weight.device)


def _saliency(weight: Tensor, context: MaskContext) -> Tensor:
    return _magnitude(weight, context) * _gradient(weight, context)


def wm(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose the ``count`` entries of a weight ``(out, ...)`` of the largest magnitude (P 3.1, SHiRA-WM)."""
    return _top(_magnitude(weight, context), count, context)


def grad(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose the ``count`` entries of a weight ``(out, ...)`` of the largest gradient magnitude, summed over a
    calibration set (P 3.1, SHiRA-Grad)."""
    return _top(_gradient(weight, context), count, context)


def grad_mean(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose the ``count`` entries of a weight ``(out, ...)`` of the largest mean gradient over a calibration set:
    those on whose sign its batches agree. Ours, after SHiRA-Grad (P 3.1); with ``budget="global"`` the best in
    docs/study.md."""
    return _top(_gradient(weight, context), count, context)


def snip(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose the ``count`` entries of the largest ``abs(weight * gradient)``, ``(out, ...)`` (P 3.1, SHiRA-SNIP)."""
    return _top(_saliency(weight, context), count, context)


def struct(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose every f-th column of a weight ``(out, ...)`` and the diagonal, f set by ``count`` (P 3.1, SHiRA-Struct).

    Whole columns alone are of rank 1; the diagonal makes the delta of high rank. At most ``count`` entries, unless
    the diagonal alone has more. The first column is drawn at random, so adapters of other seeds are offset.
    Columns, not rows: only the selected inputs of a layer are needed to train them. GPT-2's Conv1D stores (in, out):
    there ``struct_rows`` selects inputs.
    """
    return _lines(weight, count, context, rows=False)


def struct_rows(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose every f-th row of a weight ``(out, ...)`` and the diagonal: ``struct`` for rows (P 3.1, SHiRA-Struct)."""
    return _lines(weight, count, context, rows=True)


def _lines(weight: Tensor, count: int, context: MaskContext, *, rows: bool) -> Tensor:
    height, width = weight.shape[0], weight[0].numel()  # (out, in), (out, in, kh, kw) -> (out, in * kh * kw)
    lines, length = (height, width) if rows else (width, height)
    diagonal = min(height, width)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=weight.device)
    # The diagonal crosses each line once where there are as many lines as its entries, else only some of them.
    crossed = 1 if lines == diagonal else 0
    kept = min(lines, max(0, (count - diagonal) // max(1, length - crossed)))
    blocked = None if context.blocked is None else context.blocked.view(height, width).cpu()
    chosen = _spaced(lines, kept, context.generator, None if blocked is None else blocked.sum(1 if rows else 0))
    step = torch.arange(diagonal, device="cpu")
    shift = 0 if blocked is None else _free_shift(blocked, diagonal)
    mask = torch.zeros(height, width, dtype=torch.bool, device="cpu")
    mask[step % height, (step + shift) % width] = True
    if rows:
        mask[chosen] = True
    else:
        mask[:, chosen] = True
    if blocked is not None:
        mask &= ~blocked
    return mask.flatten().nonzero().flatten().to(weight.device)


def _spaced(lines: int, kept: int, generator: torch.Generator, used: Tensor | None) -> Tensor:
    """``kept`` line numbers, evenly spaced, from a random start; where some are in use, from the freest start."""
    if kept == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    spread = torch.arange(kept, device="cpu") * lines // kept
    stride = max(1, lines // kept)
    start = int(torch.randint(stride, (1,), generator=generator, device="cpu"))
    if used is not None:
        cost = torch.stack([used[(spread + (start + s) % stride) % lines].sum() for s in range(stride)])
        start = (start + int(cost.argmin())) % stride
    return (spread + start) % lines


def _free_shift(blocked: Tensor, diagonal: int) -> int:
    """The cyclic shift of the diagonal that meets the fewest blocked entries."""
    height, width = blocked.shape
    step = torch.arange(diagonal, device="cpu")
    best, fewest = 0, diagonal + 1
    for shift in range(width):
        met = int(blocked[step % height, (step + shift) % width].sum())
        if met < fewest:
            best, fewest = shift, met
        if met == 0:
            break
    return best


def block(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose aligned runs of 32 entries of a weight ``(out, ...)``, those of the largest summed magnitude.

    Runs are copied, not scattered, so switching is several times faster; ``round(count / 32)`` runs, at least one
    where the weight has one. Ours, after the block sparsity of hardware.
    """
    runs = weight.numel() // BLOCK_SIZE
    score = weight.flatten()[: runs * BLOCK_SIZE].float().abs().view(runs, BLOCK_SIZE).sum(1)
    return _runs(_top(score, _run_count(runs, count), _run_context(runs, context)))


def block_rand(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """Choose aligned runs of 32 entries of a weight ``(out, ...)`` uniformly at random; see ``block``."""
    runs = weight.numel() // BLOCK_SIZE
    return _runs(_draw(runs, _run_count(runs, count), _run_context(runs, context)).to(weight.device))


def _run_count(runs: int, count: int) -> int:
    return min(runs, max(1, round(count / BLOCK_SIZE))) if count else 0


def _run_context(runs: int, context: MaskContext) -> MaskContext:
    blocked = context.blocked
    if blocked is not None:
        blocked = blocked[: runs * BLOCK_SIZE].view(runs, BLOCK_SIZE).any(1)
    return MaskContext(context.generator, blocked, None)


def _runs(starts: Tensor) -> Tensor:
    return (starts[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=starts.device)).flatten()


FAMILIES: dict[str, MaskFamily] = {
    "struct": struct,
    "struct_rows": struct_rows,
    "rand": rand,
    "wm": wm,
    "grad": grad,
    "grad_mean": grad_mean,
    "snip": snip,
    "block": block,
    "block_rand": block_rand,
}
CALIBRATED = ("grad", "grad_mean", "snip")
"""The families that need gradients."""
BUDGETS = ("weight", "global")
_SCORES: dict[str, Callable[[Tensor, MaskContext], Tensor]] = {
    "wm": _magnitude,
    "grad": _gradient,
    "grad_mean": _gradient,
    "snip": _saliency,
}
"""Of the families that rank entries: what they rank by, at least zero, in the weight's shape."""
RANKED = tuple(_SCORES)
_EXACT = {"rand", *RANKED}


def build_masks(
    model: nn.Module | Mapping[str, nn.Module],
    family: str | MaskFamily,
    density: float = 0.02,
    targets: Targets = DEFAULT_TARGETS,
    *,
    seed: int = 0,
    calibration: Calibration | None = None,
    avoid: Iterable[ShiraAdapter] = (),
    budget: str = "weight",
) -> dict[str, Tensor]:
    """Choose the entries that an adapter trains: one mask per weight.

    Args:
        model: a module, or ``{component: module}``; then names begin with the component, as in files.
        family: a name in ``FAMILIES``, or a function ``(weight, count, context) -> flat indices``.
        density: fraction of each weight's entries, in (0, 1]; with a global budget of the entries of all.
        targets: which weights, see ``targets.select``.
        seed: masks are drawn per (seed, parameter name), so layers of one shape do not share one; the global random
            state is neither read nor changed.
        calibration: for ``grad``, ``grad_mean`` and ``snip``: an iterable of scalar losses or of functions that return
            one, each back-propagated in turn, or a mapping of parameter name to gradient.
        avoid: adapters of the model whose entries must not be used again; they may change other weights too.
        budget: "weight" gives each weight the same density; "global" ranks the entries of all weights together, so
            that weights that matter more get more. For wm, grad, grad_mean and snip.

    Returns:
        ``{name: int64 (nnz,)}``, sorted, on the weight's device. ``nnz`` is ``round(density * numel)`` for rand, wm,
        grad, grad_mean and snip; whole runs of 32 for block; whole columns and the diagonal for struct. With a global
        budget it is ``round(density * numel of all)`` in all, and weights that get none have no mask.

    Raises:
        ShiraError: a pipeline (name the components to train), unknown family or budget, a global budget for a family
            that ranks nothing, density out of range, or grad, grad_mean and snip without calibration.
        AdapterMismatchError: targets that match nothing, gradients missing, adapters in ``avoid`` that do not fit the
            model, too few entries left by them, or a density that chooses no entry at all.
    """
    require_modules(model, "a module or {component: module}", 'build_masks({"unet": pipe.unet}, ...)')
    chosen = FAMILIES.get(family) if isinstance(family, str) else family
    if chosen is None:
        raise ShiraError(f"unknown mask family {family!r}, expected one of {', '.join(FAMILIES)} or a function")
    require_density(density)
    _require_budget(budget, family)
    weights = select(model, targets)
    size = sum(weight.numel() for weight in weights.values())
    if family in CALIBRATED and calibration is None:
        raise ShiraError(f"the {family!r} mask needs calibration=, got None: pass losses or gradients")
    signed = family == "grad_mean"
    gradients = {} if calibration is None else gradient_magnitudes(model, weights, calibration, signed=signed)
    avoided = avoided_entries(model, weights, list(avoid))
    contexts = {
        name: MaskContext(seeded(seed, name), _blocked(weight, avoided.get(name)), gradients.get(name))
        for name, weight in weights.items()
    }
    counts = {name: round(density * weight.numel()) for name, weight in weights.items()}
    if budget == "global" and not any(weight.is_meta for weight in weights.values()):  # which are refused below
        counts = _global_counts(str(family), density, weights, contexts)
        weights = {name: weight for name, weight in weights.items() if counts[name]}
    masks: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, weight in weights.items():
        context, count = contexts[name], counts[name]
        problem = _shortage(family, count, weight, context.blocked)
        if problem is None:
            masks[name] = chosen(weight, count, context).long().sort().values
            problem = _violation(family, count, masks[name], weight, context.blocked)
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise AdapterMismatchError(
            f"cannot build {family!r} masks of density {density:g} for "
            f"{counted(len(problems), 'weight', of=len(weights))}; "
            f"lower the density, avoid fewer adapters or fix the family:{listing(problems)}"
        )
    if not any(mask.numel() for mask in masks.values()):
        raise AdapterMismatchError(
            f"a density of {density:g} leaves none of the {counted(size, 'entry')} to {family!r} masks, expected at "
            "least one; raise the density, 0.01 to 0.02 is usual"
        )
    return masks


def _require_budget(budget: str, family: str | MaskFamily) -> None:
    if budget not in BUDGETS:
        raise ShiraError(f"unknown budget {budget!r}, expected one of {', '.join(BUDGETS)}")
    if budget == "global" and family not in RANKED:
        raise ShiraError(
            f"a global budget needs a family that ranks entries ({', '.join(RANKED)}), got {family!r}; "
            'use budget="weight"'
        )


def _global_counts(
    family: str, density: float, weights: Mapping[str, Tensor], contexts: Mapping[str, MaskContext]
) -> dict[str, int]:
    """How many of the entries with the highest scores of all lie in each weight; ties go to the first weights.

    Raises:
        AdapterMismatchError: fewer entries than are needed, which ``avoid`` leaves.
    """

    def scores() -> Iterator[Tensor]:
        for name, weight in weights.items():
            score, blocked = _SCORES[family](weight, contexts[name]).flatten(), contexts[name].blocked
            yield score if blocked is None else score[~blocked]

    total = round(density * sum(weight.numel() for weight in weights.values()))
    by_bin = counts_by_bin(scores())
    if (free := int(by_bin.sum())) < total:
        raise AdapterMismatchError(f"{counted(total, 'entry')} needed, {free:,} left free; avoid fewer adapters")
    level, ties, _ = cutoff(by_bin, scores(), total)
    counts: dict[str, int] = {}
    for name, score in zip(weights, scores(), strict=True):
        bits = bits_of(score)
        own = min(ties, int((bits == level).sum()))
        counts[name], ties = int((bits > level).sum()) + own, ties - own
    return counts


def _blocked(weight: Tensor, taken: list[Tensor] | None) -> Tensor | None:
    if not taken:
        return None
    blocked = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    for indices in taken:
        blocked[indices.long().to(weight.device)] = True
    return blocked


def _shortage(family: str | MaskFamily, count: int, weight: Tensor, blocked: Tensor | None) -> str | None:
    if weight.is_meta:
        return "the weight is on the meta device, expected real values; load or onload it first"
    if blocked is None:
        return None
    if family in ("block", "block_rand"):
        runs = weight.numel() // BLOCK_SIZE
        free, unit = int((~blocked[: runs * BLOCK_SIZE].view(runs, BLOCK_SIZE).any(1)).sum()), "run"
        needed = _run_count(runs, count)
    else:
        free, needed, unit = int((~blocked).sum()), count, "entry"
    if family in _EXACT | {"block", "block_rand"} and free < needed:
        size = f" of {BLOCK_SIZE}" if unit == "run" else ""
        return f"{counted(needed, unit)}{size} needed, {free:,} left free"
    return None


def _violation(
    family: str | MaskFamily, count: int, mask: Tensor, weight: Tensor, blocked: Tensor | None
) -> str | None:
    wrong = check_indices(mask, weight.numel())
    if wrong:
        return wrong
    if family in _EXACT and mask.numel() != count:
        return f"{counted(mask.numel(), 'entry')} chosen, expected {count:,}; does the weight hold NaN?"
    if blocked is not None and bool(blocked[mask].any()):
        taken = int(blocked[mask].sum())
        return f"{counted(taken, 'entry')} {verb(taken, 'belongs', 'belong')} to avoided adapters"
    return None
