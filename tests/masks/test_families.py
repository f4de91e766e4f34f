"""Mask families against slow ones, counts, seeds, what they avoid, and calibration."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shira_diffusers import AdapterMismatchError, ShiraAdapter, ShiraError, SparseDelta, build_masks
from shira_diffusers.masks.families import BLOCK_SIZE, FAMILIES, RANKED, MaskContext, block, struct, struct_rows, wm
from shira_diffusers.seeds import seeded
from shira_diffusers.weights.targets import select
from tests import reference, tiny

DENSITIES = (0.001, 0.01, 0.05, 0.5, 1.0)
UNSTRUCTURED = ("rand", "wm", "grad", "grad_mean", "snip")


@pytest.fixture
def model() -> nn.ModuleDict:
    """Two layers of one shape, a wide one, a tall one and a convolution."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "one": nn.Linear(48, 40),
            "two": nn.Linear(48, 40),
            "wide": nn.Linear(120, 16),
            "tall": nn.Linear(8, 90),
            "conv": nn.Conv2d(6, 10, 3),
        }
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters() if p.ndim > 1}


def masks_of(model: nn.Module, family: str | Callable, density: float = 0.05, **options: object) -> dict[str, Tensor]:
    return build_masks(model, family, density, "all", calibration=gradients(model), **options)


def adapter_on(masks: dict[str, Tensor], model: nn.Module) -> ShiraAdapter:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return ShiraAdapter({n: SparseDelta(m, torch.ones(m.numel()), shapes[n]) for n, m in masks.items()})


def context_for(weight: Tensor, blocked: Tensor | None = None) -> MaskContext:
    return MaskContext(seeded(0, "w"), blocked, None)


# -------------------------------------------------------------------- what holds for every family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("density", DENSITIES)
def test_masks_are_sorted_distinct_and_in_range(model: nn.Module, family: str, density: float) -> None:
    masks = masks_of(model, family, density)
    assert list(masks) == [f"{name}.weight" for name in model]
    for name, mask in masks.items():
        assert mask.dtype == torch.int64
        assert mask.ndim == 1
        assert torch.equal(mask, mask.unique())
        if mask.numel():
            assert mask[0] >= 0
            assert mask[-1] < model.get_parameter(name).numel()


@pytest.mark.parametrize("family", UNSTRUCTURED)
@pytest.mark.parametrize("density", DENSITIES)
def test_counts_are_exact(model: nn.Module, family: str, density: float) -> None:
    for name, mask in masks_of(model, family, density).items():
        assert mask.numel() == round(density * model.get_parameter(name).numel()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_global_random_state_is_neither_read_nor_changed(model: nn.Module, family: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = masks_of(model, family, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = masks_of(model, family, 0.1)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["rand", "block_rand"])
def test_same_shaped_layers_and_other_seeds_have_other_masks(model: nn.Module, family: str) -> None:
    masks = masks_of(model, family, 0.1)
    assert not torch.equal(masks["one.weight"], masks["two.weight"])
    other = masks_of(model, family, 0.1, seed=1)
    assert not any(torch.equal(masks[name], other[name]) for name in masks if masks[name].numel() > BLOCK_SIZE)


def test_a_mask_depends_on_seed_and_name_alone(model: nn.Module) -> None:
    """Not on which other weights are adapted, nor on their order."""
    whole = build_masks(model, "rand", 0.1, "all", seed=4)
    one = build_masks(model, "rand", 0.1, ["tall"], seed=4)
    assert torch.equal(one["tall.weight"], whole["tall.weight"])


def test_seeds_are_the_same_on_every_machine() -> None:
    assert torch.randint(1000, (4,), generator=seeded(0, "unet.a.weight")).tolist() == [879, 422, 511, 74]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_begin_with_the_component(model: nn.Module, family: str) -> None:
    plain = masks_of(model, family)
    named = build_masks(
        {"unet": model},
        family,
        0.05,
        "all",
        calibration={f"unet.{name}": gradient for name, gradient in gradients(model).items()},
    )
    assert list(named) == [f"unet.{name}" for name in plain]


@pytest.mark.parametrize("family", FAMILIES)
def test_avoiding_other_adapters(model: nn.Module, family: str) -> None:
    """No entry twice; a hundred percent apart for any family."""
    density = 0.12
    first = adapter_on(masks_of(model, family, density), model)
    second = adapter_on(masks_of(model, family, density, avoid=[first], seed=7), model)
    third = masks_of(model, family, density, avoid=[first, second])
    for name, mask in third.items():
        for earlier in (first, second):
            taken = earlier.deltas[name].indices.long()
            assert not torch.isin(mask, taken).any(), name
        assert not torch.isin(second.deltas[name].indices.long(), first.deltas[name].indices.long()).any()
        if family in UNSTRUCTURED:
            assert mask.numel() == first.deltas[name].nnz


@pytest.mark.parametrize("family", UNSTRUCTURED)
def test_avoiding_up_to_the_last_entry_and_no_further(model: nn.Module, family: str) -> None:
    first = adapter_on(masks_of(model, family, 0.75), model)
    rest = masks_of(model, family, 0.25, avoid=[first])
    for name, mask in rest.items():
        taken = first.deltas[name].indices.long()
        assert torch.cat([mask, taken]).sort().values.tolist() == list(range(model.get_parameter(name).numel()))
    with pytest.raises(
        AdapterMismatchError, match=r"for 5 of 5 weights[\s\S]*one.weight: 576 entries needed, 480 left"
    ):
        masks_of(model, family, 0.3, avoid=[first])


def test_avoiding_an_adapter_with_the_other_names_of_a_text_encoder(model: nn.Module) -> None:
    parts = {"text_encoder": nn.ModuleDict({"text_model": model})}
    first = build_masks(parts, "wm", 0.1, "all")
    shapes = {f"text_encoder.text_model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
    adapter = ShiraAdapter(
        {n.replace("text_model.", ""): SparseDelta(m, torch.ones(m.numel()), shapes[n]) for n, m in first.items()}
    )
    second = build_masks(parts, "wm", 0.1, "all", avoid=[adapter])
    assert not any(torch.isin(mask, first[name]).any() for name, mask in second.items())


def test_avoiding_whole_runs(model: nn.Module) -> None:
    first = adapter_on(masks_of(model, "rand", 0.3), model)
    with pytest.raises(AdapterMismatchError, match=r"runs of 32 needed, \d+ left free"):
        masks_of(model, "block", 0.3, avoid=[first])


def test_avoided_adapters_that_fit_nothing_are_refused(model: nn.Module) -> None:
    whole = adapter_on(build_masks(model, "rand", 0.1, "all"), model)
    other = ShiraAdapter(
        {
            "one.weight": SparseDelta(torch.tensor([5]), torch.ones(1), (9, 9)),  # in range
            "two.weight": SparseDelta(torch.tensor([3000]), torch.ones(1), (60, 60)),
            "wide.weight": whole.deltas["wide.weight"],
        }
    )
    with pytest.raises(AdapterMismatchError) as told:
        build_masks(model, "rand", 0.1, "all", avoid=[whole, other, whole.prefixed("unet")])
    assert str(told.value) == (
        "cannot avoid adapters that do not fit the model; avoid those of this model, and where their names begin with "
        "components, give {component: module}:"
        "\n  - avoid[1]: one.weight: expected (40, 48), got (9, 9)"
        "\n  - avoid[1]: two.weight: expected (40, 48), got (60, 60)"
        "\n  - avoid[2]: no name of the model among its own, expected such as one.weight, got unet.conv.weight"
    )


def test_avoided_adapters_may_change_other_weights_too(model: nn.Module) -> None:
    """Those of other components, those that are not trained now, and those that are no targets."""
    first = build_masks({"unet": model}, "wm", 0.1, "all")["unet.one.weight"]
    taken = SparseDelta(first, torch.ones(first.numel()), (40, 48))
    elsewhere = SparseDelta(torch.tensor([5]), torch.ones(1), (9, 9))
    bias = SparseDelta(torch.tensor([5]), torch.ones(1), (40,))
    mixed = ShiraAdapter({"unet.one.weight": taken, "unet.gone.weight": elsewhere, "vae.x": elsewhere})
    others = [ShiraAdapter({"unet.two.bias": bias}), ShiraAdapter({"unet.conv.weight": elsewhere}), ShiraAdapter({})]
    mask = build_masks({"unet": model}, "wm", 0.1, ["one"], avoid=[mixed, *others])["unet.one.weight"]
    assert not torch.isin(mask, first).any()


@pytest.mark.parametrize("tied", [False, True], ids=["text_model.", "tied"])
def test_entries_are_avoided_under_any_name_of_their_weight(tied: bool) -> None:
    """Files of other versions of transformers name CLIP's weights otherwise."""
    encoder = tiny.text_encoder()
    name = "encoder.layers.0.self_attn.k_proj.weight"  # the first of its layer
    name = name if name in dict(encoder.named_parameters()) else f"text_model.{name}"
    other = name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
    if tied:
        other = name.replace("k_proj", "q_proj")
        encoder.get_submodule(other.removesuffix(".weight")).weight = encoder.get_parameter(name)
    parts = {"text_encoder": encoder}
    mask = build_masks(parts, "wm", 0.1, "layers.0.*")[f"text_encoder.{name}"]
    delta = SparseDelta(mask, torch.ones(mask.numel()), tuple(encoder.get_parameter(name).shape))
    avoid = [ShiraAdapter({f"text_encoder.{other}": delta})]
    assert not torch.isin(build_masks(parts, "wm", 0.1, "layers.0.*", avoid=avoid)[f"text_encoder.{name}"], mask).any()


# -------------------------------------------------------------------- the families


def slow_top(score: Tensor, count: int, blocked: set[int]) -> list[int]:
    """The highest scores, ties to the lowest index, one at a time."""
    order = sorted((-value, index) for index, value in enumerate(score.flatten().tolist()) if index not in blocked)
    return sorted(index for _, index in order[:count])


@pytest.mark.parametrize("count", [0, 1, 7, 50, 96])
@pytest.mark.parametrize("ties", [False, True])
def test_top_magnitudes(count: int, ties: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 12)
    if ties:
        weight = weight.round()
    blocked = {3, 4, 5, 90} if count < 92 else set()
    mask = torch.zeros(96, dtype=torch.bool)
    mask[list(blocked)] = True
    chosen = wm(weight, count, context_for(weight, mask if blocked else None))
    assert chosen.sort().values.tolist() == slow_top(weight.abs(), count, blocked)


def test_magnitude_gradient_and_their_product(model: nn.Module) -> None:
    slopes = gradients(model)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            continue
        slope = slopes[name].abs()
        score = {"wm": weight.abs(), "grad": slope, "grad_mean": slope, "snip": weight.abs() * slope}
        for family, expected in score.items():
            assert masks_of(model, family)[name].tolist() == slow_top(expected, round(0.05 * weight.numel()), set())


def test_half_precision_weights(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    for name, mask in masks_of(model, "wm").items():
        weight = model.get_parameter(name)
        assert mask.tolist() == slow_top(weight.float().abs(), mask.numel(), set())


@pytest.mark.parametrize("rows", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("shape", [(40, 48), (16, 120), (90, 8), (10, 6, 3, 3), (64, 64)])
@pytest.mark.parametrize("density", [0.05, 0.2])
def test_struct_is_lines_and_the_diagonal(shape: tuple[int, ...], density: float, rows: bool) -> None:
    weight = torch.zeros(shape)
    count = round(density * weight.numel())
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[(struct_rows if rows else struct)(weight, count, context_for(weight))] = True
    matrix = mask.view(shape[0], -1)
    height, width = matrix.shape
    diagonal = min(height, width)
    assert matrix[torch.arange(diagonal), torch.arange(diagonal)].all()
    full = matrix.all(1 if rows else 0)
    rest = matrix.clone()
    rest[torch.arange(diagonal), torch.arange(diagonal)] = False
    rest[full if rows else slice(None), slice(None) if rows else full] = False
    assert not rest.any(), "an entry is in no line and not on the diagonal"
    length, lines = (width, height) if rows else (height, width)
    assert mask.sum() <= max(count, diagonal)
    crossed = int(full[:diagonal].sum()) if lines > diagonal else 0  # the diagonal's share of the lines
    assert full.sum() == lines or mask.sum() + crossed > max(count, diagonal) - length, "one more line would fit"
    places = full.nonzero().flatten()
    if len(places) > 1:
        steps = places.diff()
        assert steps.max() - steps.min() <= 1, "lines are not evenly spaced"


def test_struct_has_high_rank() -> None:
    weight = torch.zeros(64, 48)
    mask = torch.zeros(64 * 48, dtype=torch.bool)
    mask[struct(weight, 200, context_for(weight))] = True
    assert reference.mask_rank(mask.view(64, 48)) == 48
    lines_only = mask.view(64, 48).all(0).expand(64, 48)
    assert reference.mask_rank(lines_only) == int(mask.view(64, 48).all(0).sum())


@pytest.mark.parametrize("family", ["block", "block_rand"])
@pytest.mark.parametrize("density", [0.001, 0.02, 0.3])
def test_blocks_are_aligned_runs(model: nn.Module, family: str, density: float) -> None:
    for name, mask in masks_of(model, family, density).items():
        count = round(density * model.get_parameter(name).numel())
        runs = mask.view(-1, BLOCK_SIZE)
        assert (runs[:, 0] % BLOCK_SIZE == 0).all()
        assert torch.equal(runs, runs[:, :1] + torch.arange(BLOCK_SIZE))
        assert len(runs) == (max(1, round(count / BLOCK_SIZE)) if count else 0)


def test_blocks_are_those_of_the_largest_magnitude() -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 50)  # 15 runs and 20 entries that belong to none
    weight.view(-1)[480:] = 100
    scores = [float(weight.view(-1)[i * 32 : i * 32 + 32].abs().sum()) for i in range(15)]
    best = sorted(range(15), key=lambda run: -scores[run])[:3]
    expected = sorted(itertools.chain(*(range(32 * run, 32 * run + 32) for run in best)))
    assert block(weight, 96, context_for(weight)).sort().values.tolist() == expected


def test_random_masks_are_uniform() -> None:
    """Each entry equally often, with few and with many entries blocked."""
    weight = torch.zeros(4, 10)
    blocked = torch.zeros(40, dtype=torch.bool)
    blocked[:8] = True
    for block_some, count in itertools.product((None, blocked), (4, 20)):
        hits = torch.zeros(40)
        for seed in range(600):
            chosen = FAMILIES["rand"](weight, count, MaskContext(seeded(seed, "w"), block_some, None))
            assert chosen.unique().numel() == count
            hits[chosen] += 1
        free = hits if block_some is None else hits[8:]
        expected = 600 * count / free.numel()
        assert (free - expected).abs().max() < 6 * expected**0.5
        assert hits.sum() == free.sum()


# -------------------------------------------------------------------- a user's own


def test_a_function_of_the_user(model: nn.Module) -> None:
    def every_tenth(weight: Tensor, count: int, context: MaskContext) -> Tensor:
        assert count == round(0.05 * weight.numel())
        assert context.gradient is None
        return torch.arange(0, weight.numel(), 10).flip(0)

    masks = build_masks(model, every_tenth, 0.05, ["wide", "conv"])
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "wide.weight": list(range(0, 1920, 10)),
        "conv.weight": list(range(0, 540, 10)),
    }


@pytest.mark.parametrize(
    ("indices", "message"),
    [([1, 1], "duplicate"), ([10**6], "out of range"), ([-1], "out of range"), ([0, 5], "belongs to avoided adapters")],
)
def test_a_wrong_function_of_the_user(model: nn.Module, indices: list[int], message: str) -> None:
    taken = adapter_on({"wide.weight": torch.tensor([5])}, model)
    with pytest.raises(AdapterMismatchError, match=rf"wide\.weight: .*{message}"):
        build_masks(model, lambda *_: torch.tensor(indices), 0.1, "wide", avoid=[taken])


# -------------------------------------------------------------------- one budget for all weights


def slow_global(scores: dict[str, Tensor], total: int) -> dict[str, list[int]]:
    """The highest of all in one sort; ties go to the first weights, and there to the lowest indices."""
    ranked = [(-float(s), w, i) for w, score in enumerate(scores.values()) for i, s in enumerate(score.flatten())]
    chosen: dict[str, list[int]] = {}
    for _, weight, index in sorted(ranked)[:total]:
        chosen.setdefault(list(scores)[weight], []).append(index)
    return {name: sorted(indices) for name, indices in chosen.items()}


@pytest.mark.parametrize("family", RANKED)
@pytest.mark.parametrize("density", [0.0005, 0.05, 0.7, 1.0])
@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "ties"])
def test_a_global_budget_equals_one_sort(model: nn.Module, family: str, density: float, levels: int | None) -> None:
    slopes = gradients(model)
    with torch.no_grad():
        model["tall"].weight.mul_(20)
        if levels:
            for name in slopes:
                slopes[name] = (slopes[name] * levels).round()
                model.get_parameter(name).copy_((model.get_parameter(name) * levels * 4).round())
    weights = {name: model.get_parameter(name).detach().abs() for name in slopes}
    scores = {
        n: weights[n] if family == "wm" else slopes[n].abs() * (weights[n] if family == "snip" else 1) for n in slopes
    }
    masks = build_masks(model, family, density, "all", calibration=slopes, budget="global")
    total = round(density * sum(score.numel() for score in scores.values()))
    assert {name: mask.tolist() for name, mask in masks.items()} == slow_global(scores, total)


def test_a_global_budget_avoids(model: nn.Module) -> None:
    slopes = gradients(model)
    first = build_masks(model, "grad", 0.3, "all", calibration=slopes, budget="global")
    second = build_masks(
        model, "grad", 0.3, "all", calibration=slopes, budget="global", avoid=[adapter_on(first, model)]
    )
    left = {name: slope.abs().flatten().index_fill(0, first[name], -1.0) for name, slope in slopes.items()}
    total = round(0.3 * sum(slope.numel() for slope in slopes.values()))
    assert {name: mask.tolist() for name, mask in second.items()} == slow_global(left, total)
    both = [adapter_on(first, model), adapter_on(second, model)]
    with pytest.raises(AdapterMismatchError, match=r"entries needed, .* left free; avoid fewer"):
        build_masks(model, "grad", 0.5, "all", calibration=slopes, budget="global", avoid=both)


@pytest.mark.parametrize("family", ["rand", "struct", "block", wm])
def test_a_global_budget_needs_ranks(model: nn.Module, family: str | Callable) -> None:
    with pytest.raises(ShiraError, match="a global budget needs a family that ranks entries"):
        build_masks(model, family, 0.1, "all", budget="global")
    with pytest.raises(ShiraError, match="unknown budget 'layer', expected one of weight, global"):
        build_masks(model, "wm", 0.1, "all", budget="layer")


# -------------------------------------------------------------------- calibration


def losses_of(model: nn.Module) -> list[Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(3, 48, generator=generator) for _ in range(4)]
    return [lambda x=x: (model["one"](x) * model["two"](x)).square().mean() for x in inputs]


def dense_sums(model: nn.Module, signed: bool) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for loss in losses_of(model):
        twin_gradients = torch.autograd.grad(loss(), [model["one"].weight, model["two"].weight])
        for name, gradient in zip(("one.weight", "two.weight"), twin_gradients, strict=True):
            sums[name] = sums.get(name, 0) + (gradient if signed else gradient.abs())
    return sums


@pytest.mark.parametrize("family", ["grad", "grad_mean", "snip"])
@pytest.mark.parametrize("kind", ["functions", "losses", "a stream", "gradients"])
def test_calibration_equals_a_dense_computation(model: nn.Module, family: str, kind: str) -> None:
    sums = dense_sums(model, signed=family == "grad_mean")
    calibration = {
        "functions": lambda: losses_of(model),
        "losses": lambda: [loss() for loss in losses_of(model)],
        "a stream": lambda: (loss() for loss in losses_of(model)),
        "gradients": lambda: sums,
    }[kind]()
    masks = build_masks(model, family, 0.1, ["one", "two"], calibration=calibration)
    for name, mask in masks.items():
        score = sums[name].abs() * (model.get_parameter(name).abs() if family == "snip" else 1)
        assert mask.tolist() == slow_top(score, mask.numel(), set())


def test_calibration_leaves_gradients_and_flags_alone(model: nn.Module) -> None:
    """Of the targets and of all others."""
    model["one"].weight.requires_grad_(False)
    model["two"].weight.grad = torch.ones(40, 48)
    model["two"].bias.grad = torch.ones(40)
    before = copy.deepcopy({name: (p.requires_grad, p.grad) for name, p in model.named_parameters()})
    build_masks(model, "grad", 0.1, ["one", "two"], calibration=losses_of(model))
    for name, parameter in model.named_parameters():
        flag, gradient = before[name]
        assert parameter.requires_grad is flag, name
        assert (parameter.grad is None) == (gradient is None), name
        assert gradient is None or torch.equal(parameter.grad, gradient), name
        assert not parameter._backward_hooks
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)


def test_calibration_that_raises_leaves_everything_alone(model: nn.Module) -> None:
    def broken() -> Tensor:
        raise ZeroDivisionError

    model["one"].weight.requires_grad_(False)
    with pytest.raises(ZeroDivisionError):
        build_masks(model, "grad", 0.1, ["one", "two"], calibration=[losses_of(model)[0], broken])
    assert not model["one"].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_one_dense_gradient_is_alive(model: nn.Module) -> None:
    alive = []

    def watch() -> Tensor:
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return losses_of(model)[0]()

    build_masks(model, "grad", 0.1, ["one", "two"], calibration=[watch, watch])
    assert alive == [0, 0]


def test_calibration_that_does_not_fit(model: nn.Module) -> None:
    with pytest.raises(AdapterMismatchError, match=r"wide\.weight: no gradient"):
        build_masks(model, "grad", 0.1, ["one", "wide"], calibration=losses_of(model))
    with pytest.raises(AdapterMismatchError, match=r"shape \(2, 2\), expected \(40, 48\)"):
        build_masks(model, "grad", 0.1, ["one"], calibration={"one.weight": torch.ones(2, 2)})
    with pytest.raises(AdapterMismatchError, match="not finite"):
        build_masks(model, "grad", 0.1, ["one"], calibration={"one.weight": torch.full((40, 48), torch.nan)})


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, torch.nan])
def test_density_is_a_fraction(model: nn.Module, density: float) -> None:
    with pytest.raises(ShiraError, match=r"density must be in \(0, 1\]"):
        build_masks(model, "rand", density, "all")


@pytest.mark.parametrize(("family", "budget"), [("wm", "global"), ("wm", "weight"), ("struct", "weight")])
def test_a_density_that_leaves_no_entry(model: nn.Module, family: str, budget: str) -> None:
    size = sum(weight.numel() for weight in select(model, "all").values())
    message = f"density of 1e-09 leaves none of the {size:,} entries to {family!r} masks, .*raise the density"
    with pytest.raises(AdapterMismatchError, match=message):
        build_masks(model, family, 1e-9, "all", budget=budget)


def test_errors(model: nn.Module) -> None:
    with pytest.raises(ShiraError, match="unknown mask family 'randm', expected one of struct"):
        build_masks(model, "randm", 0.1, "all")
    for family in ("grad", "grad_mean", "snip"):
        with pytest.raises(ShiraError, match=f"the '{family}' mask needs calibration="):
            build_masks(model, family, 0.1, "all")
    with pytest.raises(AdapterMismatchError, match="match none of the 5"):
        build_masks(model, "rand", 0.1, "to_q")
    with pytest.raises(AdapterMismatchError, match="meta device"):
        build_masks(nn.ModuleDict({"a": nn.Linear(4, 4, device="meta")}), "rand", 0.1, "all")
    with torch.no_grad():
        model["one"].weight.fill_(torch.nan)
    with pytest.raises(AdapterMismatchError, match=r"one\.weight: .*does the weight hold NaN"):
        build_masks(model, "wm", 0.1, "all")


def test_masks_do_not_depend_on_fused_copies_or_compilation() -> None:
    model, twin = tiny.unet(), tiny.unet()
    twin.fuse_qkv_projections()
    twin.mid_block = torch.compile(twin.mid_block, backend="eager")
    masks, others = build_masks(model, "rand", 0.05), build_masks(twin, "rand", 0.05)
    assert masks.keys() == others.keys()
    assert all(torch.equal(masks[name], others[name]) for name in masks)
