"""Ways to mix adapters: merges into one change, and mixing in time. Each is one row of `METHODS`.

A method takes the adapters' changes, their strengths and the layout, and returns the schedule of a picture's steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.study.flat import Layout
from benchmarks.study.sampling import Pass, Schedule
from examples.emoji.evaluate import GUIDANCE

Method = Callable[[Sequence[Tensor], Sequence[float], Layout], Schedule]
Merge = Callable[[Sequence[Tensor], Layout], Tensor]


def always(change: Tensor | None) -> Schedule:
    """One pass under one change, at each step."""
    passes = [Pass(change)]
    return lambda step, steps: passes


def _merged(merge: Merge) -> Method:
    """Scale, merge, and draw with one pass."""

    def method(changes: Sequence[Tensor], strengths: Sequence[float], layout: Layout) -> Schedule:
        return always(merge([s * change for s, change in zip(strengths, changes, strict=True)], layout))

    return method


def _sum(changes: Sequence[Tensor], layout: Layout) -> Tensor:
    return torch.stack(list(changes)).sum(0)


def _mean_on_overlap(changes: Sequence[Tensor], layout: Layout) -> Tensor:
    """The sum, but the mean where several change an entry."""
    stack = torch.stack(list(changes))
    return stack.sum(0) / (stack != 0).sum(0).clamp(min=1)


def _ties(changes: Sequence[Tensor], layout: Layout) -> Tensor:
    """Keep each one's largest half, elect a sign, add what agrees. (TIES, arXiv 2306.01708; sum instead of mean)"""
    kept = torch.stack([_largest(change, 0.5) for change in changes])
    sign = kept.sum(0).sign()
    return torch.where(kept.sign() == sign, kept, 0).sum(0)


def _largest(change: Tensor, share: float) -> Tensor:
    """Zero but the largest `share` of the entries that differ from zero."""
    size = change.abs()
    count = max(1, int(share * int((change != 0).sum())))
    return torch.where(size >= size.topk(count).values[-1], change, 0)


def _dare(changes: Sequence[Tensor], layout: Layout) -> Tensor:
    """Drop half of each one's entries at random and double the others. (DARE, arXiv 2311.03099)"""
    own = torch.Generator(changes[0].device).manual_seed(0)
    kept = [torch.rand(c.shape, generator=own, device=c.device) < 0.5 for c in changes]
    return torch.stack([2 * c * k for c, k in zip(changes, kept, strict=True)]).sum(0)


def _strongest(changes: Sequence[Tensor], layout: Layout) -> Tensor:
    """Where several change an entry, the largest wins."""
    stack = torch.stack(list(changes))
    return stack.gather(0, stack.abs().argmax(0, keepdim=True))[0]


def _layer_winner(changes: Sequence[Tensor], layout: Layout) -> Tensor:
    """In each weight the adapter of the larger change wins. (after K-LoRA, arXiv 2502.18461)"""
    total = [change.norm() + 1e-12 for change in changes]
    merged = torch.zeros_like(changes[0])
    for _, shape, start in layout.spans():
        span = slice(start, start + shape.numel())
        shares = [float(change[span].norm() / whole) for change, whole in zip(changes, total, strict=True)]
        merged[span] = changes[shares.index(max(shares))][span]
    return merged


def _orthogonal(changes: Sequence[Tensor], layout: Layout) -> Tensor:
    """Each weight's later changes without their part along the earlier ones."""
    merged = torch.zeros_like(changes[0])
    for _, shape, start in layout.spans():
        done: list[Tensor] = []
        for change in changes:
            part = change[start : start + shape.numel()].clone()
            for other in done:
                part -= other * (part @ other) / (other @ other + 1e-12)
            done.append(part)
        merged[start : start + shape.numel()] = torch.stack(done).sum(0)
    return merged


def _alternate(changes: Sequence[Tensor], strengths: Sequence[float], layout: Layout) -> Schedule:
    """One adapter a step, in turn."""
    passes = [[Pass(s * change)] for s, change in zip(strengths, changes, strict=True)]
    return lambda step, steps: passes[step % len(passes)]


def _early_late(switch: float) -> Method:
    """The first adapter up to `switch` of the steps, then the others' sum."""

    def method(changes: Sequence[Tensor], strengths: Sequence[float], layout: Layout) -> Schedule:
        scaled = [s * change for s, change in zip(strengths, changes, strict=True)]
        early, late = [Pass(scaled[0])], [Pass(_sum(scaled[1:], layout))]
        return lambda step, steps: early if step < switch * steps else late

    return method


def _backwards(method: Method) -> Method:
    """The same with the adapters in reverse order."""
    return lambda changes, strengths, layout: method(changes[::-1], strengths[::-1], layout)


def _effects(prompted: float, empty: float) -> Method:
    """The base's velocity and each adapter's effect on it: v + sum s (v_i - v), one pass each and one of the base.

    `prompted` and `empty` are the shares of the effects on the two halves; (GUIDANCE, 1 - GUIDANCE) is the product of
    the adapters' distributions over the base's. (Composable Diffusion, arXiv 2206.01714)
    """

    def method(changes: Sequence[Tensor], strengths: Sequence[float], layout: Layout) -> Schedule:
        total = sum(strengths)
        passes = [Pass(None, GUIDANCE - total * prompted, 1 - GUIDANCE - total * empty)]
        passes += [Pass(c, s * prompted, s * empty) for s, c in zip(strengths, changes, strict=True)]
        return lambda step, steps: passes

    return method


def _mean_of_passes(changes: Sequence[Tensor], strengths: Sequence[float], layout: Layout) -> Schedule:
    """The mean of the adapters' velocities, each under its own strength of weights."""
    n = len(changes)
    passes = [Pass(s * c, GUIDANCE / n, (1 - GUIDANCE) / n) for s, c in zip(strengths, changes, strict=True)]
    return lambda step, steps: passes


def _of_sum(passes: Callable[[Tensor], list[Pass]]) -> Method:
    """The same passes at each step, made of the sum of the scaled changes."""

    def method(changes: Sequence[Tensor], strengths: Sequence[float], layout: Layout) -> Schedule:
        made = passes(_sum([s * change for s, change in zip(strengths, changes, strict=True)], layout))
        return lambda step, steps: made

    return method


def _halves(prompted: float, empty: float, guidance: float = GUIDANCE) -> Method:
    """The prompted half under the sum, the other half partly under the base: (1 + w) v_mix - w v_base.

    `prompted` is what the base's prompted half has of the guidance, `empty` what its other half has; the sum has the
    rest of each. (0, 1): away from plain pictures without a prompt, so guidance drives the styles as well.
    """
    extra = guidance - 1
    base = Pass(None, prompted * extra, -empty * extra)
    return _of_sum(lambda mix: [base, Pass(mix, guidance - prompted * extra, -(1 - empty) * extra)])


def _negative_at(share: float, guidance: float = GUIDANCE) -> Method:
    """The half without a prompt under `share` of the mix's strengths: a switch between the halves, no further pass."""
    return _of_sum(lambda mix: [Pass(share * mix, 0.0, 1 - guidance), Pass(mix, guidance, 0.0)])


def _guided(guidance: float) -> Method:
    """The sum at another guidance."""
    return _of_sum(lambda mix: [Pass(mix, guidance, 1 - guidance)])


def _alternate_from_plain(changes: Sequence[Tensor], strengths: Sequence[float], layout: Layout) -> Schedule:
    """One adapter a step, in turn, each driven away from the base without a prompt."""
    base = Pass(None, 0.0, 1 - GUIDANCE)
    passes = [[base, Pass(s * change, GUIDANCE, 0.0)] for s, change in zip(strengths, changes, strict=True)]
    return lambda step, steps: passes[step % len(passes)]


def _blocks(first: Sequence[str], rest: Sequence[str]) -> Method:
    """The first adapter only in weights whose names begin with `first`, the others only in `rest`."""

    def merge(changes: Sequence[Tensor], layout: Layout) -> Tensor:
        merged = torch.zeros_like(changes[0])
        for name, shape, start in layout.spans():
            span = slice(start, start + shape.numel())
            if name.startswith(tuple(first)):
                merged[span] += changes[0][span]
            if name.startswith(tuple(rest)):
                merged[span] += _sum([change[span] for change in changes[1:]], layout)
        return merged

    return _merged(merge)


_DOWN, _UP = ("conv_in", "time_embedding", "down_blocks", "mid_block"), ("up_blocks", "conv_out")

METHODS: dict[str, Method] = {
    "sum": _merged(_sum),
    "mean": _merged(_mean_on_overlap),
    "ties": _merged(_ties),
    "dare": _merged(_dare),
    "strongest": _merged(_strongest),
    "layer_winner": _merged(_layer_winner),
    "orthogonal": _merged(_orthogonal),
    "down_up": _blocks(_DOWN, _UP),
    "up_down": _blocks(_UP, _DOWN),
    "alternate": _alternate,
    "early_late_30": _early_late(0.3),
    "early_late_50": _early_late(0.5),
    "early_late_70": _early_late(0.7),
    "late_early_30": _backwards(_early_late(0.3)),
    "late_early_50": _backwards(_early_late(0.5)),
    "late_early_70": _backwards(_early_late(0.7)),
    "effects": _effects(GUIDANCE, 1 - GUIDANCE),
    "effects_unguided": _effects(1.0, 0.0),
    "mean_of_passes": _mean_of_passes,
    "from_plain": _halves(0.0, 1.0),
    "half_from_plain": _halves(0.0, 0.5),
    "half_from_plain_2": _halves(0.0, 0.5, 2.0),
    "negative_half": _negative_at(0.5),
    "negative_half_2": _negative_at(0.5, 2.0),
    "negative_70": _negative_at(0.7),
    "base_guidance": _halves(1.0, 1.0),
    "guidance_5": _guided(5.0),
    "guidance_2": _guided(2.0),
    "guidance_15": _guided(1.5),
    "guidance_1": _guided(1.0),
    "alternate_from_plain": _alternate_from_plain,
}
"""By name: how several adapters are mixed."""
