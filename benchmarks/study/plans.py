"""Which recipes are tried, on what: each plan is a list of jobs, and a job's result is one file a seed."""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.study.arena import STYLES, Exam
from benchmarks.study.mixing import METHODS
from benchmarks.study.recipes import Recipe, lora, shira
from benchmarks.study.stats import best, load, table

EVERYWHERE = {"mask": "steady", "budget": "global"}
FOUR_WAYS = ("sum", "guidance_2", "half_from_plain", "half_from_plain_2")
FOUR_STYLES = ("bluefire", "gold", "linework", "mosaic")
LORA = lora("lora16-average", 16, 0, average=True)
STEADY = shira("steady-global-average", 0, average=True, **EVERYWHERE)
SCREEN = Exam(count=48, single=(0.8, 1.0, 1.2, 1.4, 1.7), mixed=(0.6, 0.8, 1.0, 1.2, 1.4, 1.7))


@dataclass(frozen=True)
class Job:
    """One recipe with one seed, and its exam."""

    recipe: Recipe
    seed: int
    exam: Exam

    @property
    def file(self) -> str:
        return f"{self.recipe.name}-{self.seed}.json"


def _each(recipes: list[Recipe], exam: Exam, seeds: tuple[int, ...] = (0,)) -> list[Job]:
    return [Job(recipe, seed, exam) for seed in seeds for recipe in recipes]


def _rated(recipe: Recipe, *rates: float) -> list[Recipe]:
    return [recipe.at(rate) for rate in rates]


def screen() -> list[Job]:
    """One seed of everything that may matter: rates, density, masks, targets, the optimizer, who is beside."""
    tried = _rated(lora("lora16", 16, 0), 5e-4, 1e-3, 2e-3)
    tried += _rated(shira("grad", 0), 1e-3, 2e-3, 3e-3)
    tried += _rated(shira("grad-small", 0, targets="all+small"), 1e-3, 2e-3, 3e-3)
    tried += _rated(shira("small", 0, targets="+small"), 1e-2, 3e-2)
    tried += _rated(shira("steady", 0, mask="steady"), 1e-3, 3e-3)
    tried += _rated(shira("grad-smooth1", 0, smooth=1.0), 4e-3, 1e-2)
    tried += _rated(shira("grad-smooth10", 0, smooth=10.0), 2e-2, 5e-2)
    tried += _rated(shira("grad-decay1", 0, decay=1.0), 2e-3, 4e-3)
    tried += _rated(shira("grad-batch64", 0, batch=64), 1e-3, 3e-3)
    tried += _rated(lora("lora16-batch64", 16, 0, batch=64), 1e-3)
    tried += _rated(shira("grad-steps1200", 0, steps=1200), 5e-4, 1e-3)
    tried += _rated(lora("lora16-steps1200", 16, 0, steps=1200), 5e-4)
    tried += _rated(shira("grad-10%", 0, density=0.1), 5e-4, 1e-3)
    tried += _rated(shira("dense", 0, density=1.0, mask="wm"), 1e-4, 3e-4)
    tried += _rated(shira("grad-30%", 0, density=0.3), 3e-4)
    tried += _rated(shira("grad-0.5%", 0, density=0.005), 3e-3, 6e-3)
    tried += _rated(shira("grad-4%", 0, density=0.04), 1e-3, 2e-3)
    tried += _rated(shira("grad-attention+ff", 0, targets="attention+ff"), 3e-3, 6e-3)
    tried += _rated(lora("lora16-attention+ff", 16, 0, targets="attention+ff"), 1e-3, 2e-3)
    tried += _rated(shira("grad-resnets", 0, targets="resnets"), 3e-3)
    tried += _rated(shira("grad-up", 0, targets="up", density=0.04), 3e-3)
    tried += _rated(shira("grad-mid+up", 0, targets="mid+up", density=0.03), 3e-3)
    tried += _rated(lora("lora16-up", 16, 0, targets="up"), 1e-3)
    tried += _rated(shira("grad-linear", 0, targets="linear"), 3e-3)
    tried += _rated(shira("grad-cross", 0, targets="cross", density=0.1), 3e-3)
    tried += _rated(lora("lora4", 4, 0), 1e-3, 3e-3)
    tried += _rated(lora("lora64", 64, 0), 3e-4, 1e-3)
    tried += _rated(shira("rand", 0, mask="rand"), 3e-3, 6e-3)
    tried += _rated(shira("wm", 0, mask="wm"), 3e-3)
    tried += _rated(shira("struct", 0, mask="struct"), 1e-3, 3e-3)
    tried += _rated(shira("struct_rows", 0, mask="struct_rows"), 1e-3, 3e-3)
    tried += _rated(shira("snip", 0, mask="snip"), 2e-3)
    tried += _rated(shira("ratio", 0, mask="ratio"), 3e-3, 6e-3)
    tried += _rated(shira("difference", 0, mask="difference"), 2e-3)
    tried += _rated(shira("quiet", 0, mask="quiet"), 1e-2)
    tried += _rated(shira("grad-global", 0, budget="global"), 2e-3)
    tried += _rated(shira("steady-global", 0, mask="steady", budget="global"), 2e-3)
    tried += _rated(shira("grad-relative", 0, relative=True), 3e-3)
    tried += _rated(shira("grad-avoid", 0, avoid=True), 2e-3)
    tried += _rated(shira("grad-sam", 0, sharpness=1.0), 2e-3)
    tried += _rated(shira("grad-under-looks", 0, beside="looks", under=True), 2e-3)
    tried += _rated(shira("grad-under-ghosts", 0, beside="ghosts", under=True), 2e-3)
    tried += _rated(lora("lora16-under-looks", 16, 0, beside="looks", under=True), 1e-3)
    tried += _rated(shira("grad-additive", 0, beside="looks", additive=1.0), 2e-3)
    tried += _rated(shira("small-batch64", 0, targets="+small", batch=64), 1e-2)
    tried += _rated(lora("lora16-small", 16, 0, targets="all+small"), 1e-3)
    tried += _rated(lora("lora16-decay1", 16, 0, decay=1.0), 1e-3)
    return _each(tried, SCREEN)


def mixing() -> list[Job]:
    """All ways to mix, on adapters of the two plain methods: what a mix of weights loses against a mix of effects."""
    methods = ("sum", "effects", "effects_unguided", "mean_of_passes", "alternate", "early_late_50", "late_early_50")
    exam = Exam(count=48, mixed=(0.6, 0.8, 1.0), methods=methods)
    return _each([lora("lora16", 16, 1e-3), shira("shira-grad")], exam)


def ways() -> list[Job]:
    """Mixing in time again: guidance from the base, other guidance, and stronger alternation."""
    low, high = (0.3, 0.45, 0.6, 0.8, 1.0), (1.3, 1.6, 2.0)
    exams = {
        "plain": Exam(count=48, single=low, mixed=low, methods=("from_plain", "half_from_plain", "base_guidance")),
        "guidance": Exam(count=48, single=(1.0, 1.2), mixed=(1.0, 1.2), methods=("guidance_2", "guidance_5")),
        "turns": Exam(count=48, single=(1.0,), mixed=high, methods=("alternate", "mean_of_passes")),
        "plainturns": Exam(count=48, single=(1.0,), mixed=(0.6, 0.9, 1.2, 1.6), methods=("alternate_from_plain",)),
    }
    recipes = [lora("lora16", 16, 1e-3), shira("grad", 2e-3), shira("grad-10%", 1e-3, density=0.1)]
    return [
        Job(replace(recipe, name=f"{recipe.name}-{name}"), 0, exam)
        for name, exam in exams.items()
        for recipe in recipes[: 3 if name == "plain" else 2]
    ]


def second() -> list[Job]:
    """One seed of what the first screen left open: fewer steps, rehearsal, norms and biases, where entries lie."""
    tried = _rated(shira("grad-10%-small", 0, targets="all+small", density=0.1), 1e-3)
    tried += _rated(shira("grad-rehearse", 0, rehearse=192), 2e-3)
    tried += _rated(lora("lora16-rehearse", 16, 0, rehearse=192), 1e-3)
    tried += _rated(shira("grad-10%-rehearse", 0, rehearse=192, density=0.1), 1e-3)
    tried += _rated(lora("lora4", 4, 0), 1e-3, 3e-3)
    tried += _rated(lora("lora16-steps200", 16, 0, steps=200), 1e-3, 2e-3)
    tried += _rated(shira("grad-steps200", 0, steps=200), 2e-3, 4e-3)
    tried += _rated(shira("grad-10%-steps200", 0, steps=200, density=0.1), 1e-3)
    tried += _rated(shira("grad-under-looks", 0, beside="looks", under=True), 2e-3)
    tried += _rated(lora("lora16-under-looks", 16, 0, beside="looks", under=True), 1e-3)
    tried += _rated(shira("grad-sam", 0, sharpness=1.0), 2e-3)
    tried += _rated(lora("lora16-small", 16, 0, targets="all+small"), 1e-3)
    tried += _rated(shira("rand", 0, mask="rand"), 3e-3)
    tried += _rated(shira("struct_rows", 0, mask="struct_rows"), 2e-3)
    tried += _rated(shira("grad-mid+up", 0, targets="mid+up", density=0.03), 2e-3)
    tried += _rated(shira("grad-resnets", 0, targets="resnets"), 2e-3)
    tried += _rated(lora("lora64", 64, 0), 3e-4)
    tried += _rated(shira("steady-global", 0, mask="steady", budget="global"), 2e-3)
    tried += _rated(shira("ratio", 0, mask="ratio"), 3e-3)
    tried += _rated(shira("struct", 0, mask="struct"), 2e-3)
    tried += _rated(shira("wm", 0, mask="wm"), 2e-3)
    tried += _rated(shira("grad-up", 0, targets="up", density=0.04), 2e-3)
    tried += _rated(shira("quiet", 0, mask="quiet"), 1e-2)
    tried += _rated(shira("grad-global", 0, budget="global"), 2e-3)
    tried += _rated(shira("grad-avoid", 0, avoid=True), 2e-3)
    tried += _rated(shira("snip", 0, mask="snip"), 2e-3)
    tried += _rated(shira("grad-under-ghosts", 0, beside="ghosts", under=True), 2e-3)
    tried += _rated(shira("grad-relative", 0, relative=True), 2e-3)
    tried += _rated(shira("grad-additive", 0, beside="looks", additive=1.0), 2e-3)
    return _each(tried, SCREEN)


def third() -> list[Job]:
    """One seed, at lower guidance: entries wherever gradients agree most, against LoRA in the same blocks."""
    ways = ("guidance_2", "guidance_15")
    exam = Exam(count=48, single=(1.0, 1.2), mixed=(0.8, 1.0, 1.2), methods=ways)
    tried = _rated(lora("lora16", 16, 0), 1e-3, 2e-3)
    tried += _rated(shira("steady-global", 0, **EVERYWHERE), 1e-3, 2e-3, 4e-3)
    tried += _rated(lora("lora16-outer", 16, 0, targets="outer"), 1e-3, 2e-3)
    tried += _rated(shira("steady-global-small", 0, targets="all+small", **EVERYWHERE), 2e-3)
    tried += _rated(shira("steady-global-4%", 0, density=0.04, **EVERYWHERE), 2e-3)
    tried += _rated(shira("steady-global-10%", 0, density=0.1, **EVERYWHERE), 1e-3)
    tried += _rated(shira("steady-global-1%", 0, density=0.01, **EVERYWHERE), 3e-3)
    tried += _rated(shira("grad-global", 0, budget="global"), 2e-3)
    tried += _rated(shira("grad", 0), 2e-3)
    tried += _rated(shira("grad-outer", 0, targets="outer", density=0.1), 2e-3)
    return _each(tried, exam)


def fourth() -> list[Job]:
    """One seed on the shipped base: `steady-global` at lower rates, spread wider, and made to rely on fewer others."""
    exam = Exam(count=48, single=(1.0,), mixed=(0.8, 1.0, 1.2), methods=("sum", "guidance_2"))
    tried = _rated(shira("steady-global", 0, **EVERYWHERE), 5e-4, 1e-3, 7e-4, 3e-4)
    tried += _rated(shira("steady-global-cap10", 0, cap=0.1, **EVERYWHERE), 1e-3)
    tried += _rated(shira("steady-global-dropout", 0, dropout=0.5, **EVERYWHERE), 1e-3)
    tried += _rated(shira("steady-global-average", 0, average=True, **EVERYWHERE), 1e-3)
    tried += _rated(shira("steady-global-avoid", 0, avoid=True, **EVERYWHERE), 1e-3)
    tried += _rated(lora("lora16", 16, 0), 5e-4, 1e-3)
    tried += _rated(shira("steady-global-10%", 0, density=0.1, **EVERYWHERE), 5e-4)
    tried += _rated(shira("steady-global-4%", 0, density=0.04, **EVERYWHERE), 5e-4)
    tried += _rated(shira("steady-global-cap5", 0, cap=0.05, **EVERYWHERE), 1e-3)
    tried += _rated(shira("snip-global", 0, mask="snip", budget="global"), 1e-3)
    tried += _rated(shira("steady-global-ghosts", 0, beside="ghosts", under=True, **EVERYWHERE), 1e-3)
    tried += _rated(shira("steady-global-additive", 0, beside="looks", additive=1.0, **EVERYWHERE), 1e-3)
    return _each(tried, exam)


def fifth() -> list[Job]:
    """One seed on the shipped base: averaged values with higher rates, and the half without a prompt half plain."""
    exam = Exam(count=48, single=(1.0,), mixed=(0.8, 1.0, 1.2), methods=FOUR_WAYS)
    lasting = {"average": True, **EVERYWHERE}
    tried = _rated(STEADY, 1e-3, 1.5e-3, 2e-3) + _rated(LORA, 1e-3, 2e-3) + _rated(lora("lora16", 16, 0), 1e-3)
    tried += _rated(shira("steady-global-average-cap25", 0, cap=0.25, **lasting), 1e-3)
    tried += _rated(shira("steady-global-average-4%", 0, density=0.04, **lasting), 1e-3)
    tried += _rated(shira("steady-global-average-dropout", 0, dropout=0.5, **lasting), 1e-3)
    tried += _rated(shira("steady-global-average-1%", 0, density=0.01, **lasting), 1.5e-3)
    return _each(tried, exam)


def negatives() -> list[Job]:
    """One seed: the half without a prompt under a part of the mix, which costs two switches a step and no pass."""
    ways = ("negative_half", "negative_half_2", "negative_70")
    exam = Exam(count=48, single=(0.8, 1.0), mixed=(0.7, 0.8, 0.9, 1.0), methods=ways)
    return _each([*_rated(STEADY, 1e-3), *_rated(LORA, 2e-3, 1e-3)], exam)


def confirm() -> list[Job]:
    """Three seeds on test concepts: pairs, triples, and the subject with each style."""
    exam = Exam("test", 64, (1.0,), (0.7, 0.85, 1.0, 1.2), methods=FOUR_WAYS[:2], sizes=(2, 3), subject=True)
    return _each([*_rated(STEADY, 1e-3), *_rated(LORA, 2e-3)], exam, (0, 1, 2))


def size() -> list[Job]:
    """One seed of four styles, for the study base: does the gap change with size?"""
    exam = Exam(
        count=48,
        single=(1.0,),
        mixed=(0.7, 0.85, 1.0, 1.2),
        methods=FOUR_WAYS[:2],
        styles=FOUR_STYLES,
    )
    lasting = {"average": True, **EVERYWHERE}
    tried = _rated(LORA, 2e-3, 1e-3, 5e-4, 2.5e-4) + _rated(STEADY, 5e-4, 1e-3, 2.5e-4)
    tried += _rated(shira("steady-global-average-1%", 0, density=0.01, **lasting), 7e-4)
    tried += _rated(LORA, 4e-3)
    tried += _rated(shira("steady-global-average-0.5%", 0, density=0.005, **lasting), 1e-3)
    tried += _rated(shira("grad", 0), 1e-3, 5e-4)
    tried += _rated(shira("steady-global-average-10%", 0, density=0.1, **lasting), 3e-4)
    return _each(tried, exam)


def large(results: Path) -> list[Job]:
    """Three seeds of four styles on test concepts, for the study base: the best LoRA and the best SHiRA of "size"."""
    exam = Exam("test", 64, (0.85, 1.0), (0.7, 0.85, 1.0, 1.2), (), FOUR_WAYS[:3], (2, 3), FOUR_STYLES)
    families = (("lora",), ("steady-global-average@", "steady-global-average-1%@", "steady-global-average-0.5%@"))
    return _each(_best_of("size", size(), families, results), exam, (0, 1, 2))


FAMILIES = (
    ("lora16@",),
    ("grad@",),
    ("steady-global@", "steady-global-small@", "grad-global@", "grad-outer@", "steady-global-1%@"),  # 2 % or fewer
    ("lora16-outer@",),
    ("steady-global-4%@", "steady-global-10%@"),
)
"""Beginnings of names: of each line the best of the plan "third" is confirmed in "final"."""


def final(results: Path) -> list[Job]:
    """Three seeds on test concepts, of the best of each family on validation concepts."""
    exam = Exam(
        "test", 64, (0.85, 1.0, 1.2, 1.4), (0.7, 0.85, 1.0, 1.15, 1.3), (), ("sum", "guidance_2", "guidance_15")
    )
    return _each(_best_of("third", third(), FAMILIES, results), exam, (0, 1, 2))


def _best_of(name: str, jobs: list[Job], families: tuple[tuple[str, ...], ...], results: Path) -> list[Recipe]:
    """Of each family of names the recipe that kept most pairs in the results of the plan `name`, its jobs `jobs`."""
    kept = {
        file["recipe"]["name"]: max(best(table([file], way, lambda mix: "+" in mix)) for way in file["exam"]["methods"])
        for file in load(results / name)
    }
    recipes = {job.recipe.name: job.recipe for job in jobs}
    tried = [[name for name in kept if name.startswith(family)] for family in families]
    return [recipes[max(names, key=kept.__getitem__)] for names in tried if names]


def toy() -> list[Job]:
    """Every kind of recipe and every way to mix, on next to nothing."""
    exam = Exam(count=2, single=(), mixed=(1.0,), styles=STYLES[:2], methods=tuple(METHODS))
    short = replace(exam, methods=("sum",), single=(1.0,), styles=STYLES[:1], subject=True)
    few = {"steps": 2, "batch": 2}
    recipes = [
        shira("grad", avoid=True, **few),
        shira("sharp", sharpness=0.05, mask="ratio", **few),
        shira("additive", beside="looks", additive=1.0, mask="rand", relative=True, **few),
        shira("under", beside="ghosts", under=True, mask="struct", targets="attention+ff", **few),
        shira("rehearse", rehearse=2, **few),
        shira("global", mask="steady", budget="global", cap=0.1, targets="up", **few),
        shira("lasting", dropout=0.5, average=True, **few),
    ]
    return _each([lora("lora", 2, 1e-3, **few)], exam) + _each(recipes, short)


PLANS = {
    "toy": toy,
    "screen": screen,
    "mixing": mixing,
    "ways": ways,
    "second": second,
    "third": third,
    "fourth": fourth,
    "fifth": fifth,
    "negatives": negatives,
    "confirm": confirm,
    "size": size,
}
CONFIRMATIONS = {"final": final, "large": large}
"""Plans of the best recipes of an earlier one."""
NAMES = (*PLANS, *CONFIRMATIONS)


def plan(name: str, results: Path) -> list[Job]:
    """The jobs of a plan; confirmations build on what an earlier one left in `results`."""
    return CONFIRMATIONS[name](results) if name in CONFIRMATIONS else PLANS[name]()
