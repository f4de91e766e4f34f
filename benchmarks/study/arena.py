"""Train a recipe's adapters of all styles, mix them, and record what the judge sees."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.effects import adapter_effects
from benchmarks.study.flat import Layout
from benchmarks.study.masks import CALIBRATION_BATCHES, Gradients, choose
from benchmarks.study.mixing import METHODS, always
from benchmarks.study.recipes import Recipe, shira
from benchmarks.study.sampling import Sampler, Verdict
from benchmarks.study.training import Bank, Draws, Objective, Slot, gradients, train
from benchmarks.study.world import (
    SUBJECT,
    TAUGHT,
    Lesson,
    Prompts,
    World,
    look_examples,
    plain_examples,
    prompts_of,
    style_examples,
    subject_examples,
    taught_concepts,
)
from examples.emoji.captions import LOOKS, caption
from examples.emoji.concepts import BACKGROUND_NAMES, CONCEPT_INDEX, CONCEPTS
from examples.emoji.evaluate import STEPS
from examples.emoji.judge_mixes import SIGHTS, MixJudge

STYLES = tuple(TAUGHT)
REHEARSAL_STRENGTH = 1.2
Row = dict[str, Any]


@dataclass(frozen=True)
class Exam:
    """What a recipe is judged on: a split and how many prompts, single strengths, and mixes.

    Args:
        sizes: how many adapters a mix has: 2 for all pairs, 3 for triples; the subject is mixed in pairs only.
        mixed: strengths, the same for all adapters of a mix.
        uneven: further strengths of pairs, one each.
    """

    split: str = "val"
    count: int = 64
    single: tuple[float, ...] = (0.7, 1.0, 1.3)
    mixed: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0, 1.25)
    uneven: tuple[tuple[float, float], ...] = ()
    methods: tuple[str, ...] = ("sum",)
    sizes: tuple[int, ...] = (2,)
    styles: tuple[str, ...] = STYLES
    subject: bool = False


@dataclass
class Arena:
    """One base with its lessons, prompts and recorded steps, ready for any recipe."""

    world: World
    judge: MixJudge
    toy: bool = False
    slots: dict[Any, list[Slot]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = Layout.of(self.world.parts.unet)
        self.weights = self.layout.flat(self.world.parts.unet)
        self.objective = Objective(self.world, self.layout, self.weights)
        self.lesson = cache(self._lesson)
        self.draws = cache(partial(Draws.make, device=self.world.device))
        self.gradients = cache(self._gradients)
        self.prompts = cache(partial(prompts_of, self.world))
        self.sampler = cache(self._sampler)
        self.bank = cache(self._bank)

    def _lesson(self, name: str) -> Lesson:
        if name == SUBJECT:
            return self.world.lesson(*subject_examples(self.world))
        if name == "plain":
            return self.world.lesson(*plain_examples(self.world))
        if name.startswith("look:"):
            return self.world.lesson(*look_examples(self.world, LOOKS.index(name.removeprefix("look:"))))
        return self.world.lesson(*style_examples(self.world, name))

    def _gradients(self, name: str, seed: int) -> Gradients:
        size = (1, 2) if self.toy else (CALIBRATION_BATCHES, 16)
        return gradients(self.objective, self.lesson(name), self.draws(seed + 1000, *size))

    def _sampler(self, count: int) -> Sampler:
        return Sampler(self.world, self.layout, self.weights, self.judge, count, 2 if self.toy else STEPS)

    def _bank(self, kind: str) -> Bank:
        """Adapters of the base's own looks, or their values at random entries of the same weights."""
        names = tuple(f"look:{look}" for look in LOOKS[1:])
        few = {"steps": 2, "batch": 2} if self.toy else {}
        made, _ = self.train(shira("bank", **few), 77, names[:2] if self.toy else names)
        changes = torch.stack(list(made.values()))
        if kind == "ghosts":
            own = torch.Generator(changes.device).manual_seed(1)
            for _, shape, start in self.layout.spans():
                order = torch.randperm(shape.numel(), generator=own, device=changes.device)
                changes[:, start : start + shape.numel()] = changes[:, start + order]
        lessons = [self.lesson(name) for name in made]
        return Bank(changes, torch.stack([x.latents for x in lessons]), torch.stack([x.texts for x in lessons]))

    def masks(self, recipe: Recipe, seed: int, names: Sequence[str]) -> list[Tensor]:
        """The entries of each adapter, in order; with `avoid` each keeps off those before it."""
        found: list[Tensor] = []
        plain = self.gradients("plain", seed)
        for number, name in enumerate(names):
            blocked = None
            if recipe.avoid and found:
                blocked = torch.zeros(self.layout.numel, dtype=torch.bool, device=self.weights.device)
                blocked[torch.cat(found)] = True
            own = {"seed": 100 * seed + number, "blocked": blocked}
            style = self.gradients(name, seed)
            found.append(choose(recipe, self.layout, self.world.parts.unet, self.weights, style, plain, **own))
        return found

    def train(self, recipe: Recipe, seed: int, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Each name's change of all weights, ``[numel]``, and the mean loss of its last fifth of steps."""
        lessons = [self.lesson(name) for name in names]
        if recipe.rehearse:
            first, _ = self.train(replace(recipe, rehearse=0), seed, names)
            lessons = [
                self._rehearsed(lesson, first[name], recipe.rehearse)
                for name, lesson in zip(names, lessons, strict=True)
            ]
        draws = self.draws(seed, recipe.steps, recipe.batch)
        masks = self.masks(recipe, seed, names) if recipe.kind == "shira" else [None] * len(names)
        slots = self._slots(recipe, draws, masks, lessons)
        for slot, lesson, mask in zip(slots, lessons, masks, strict=True):
            slot.load(recipe, lesson, draws, mask, seed)
        train(slots, recipe.steps)
        with torch.no_grad():
            changes = {name: slot.result() for name, slot in zip(names, slots, strict=True)}
        tail = max(1, recipe.steps // 5)
        return changes, {n: round(float(s.losses[-tail:].mean()), 5) for n, s in zip(names, slots, strict=True)}

    def _slots(
        self, recipe: Recipe, draws: Draws, masks: Sequence[Tensor | None], lessons: Sequence[Lesson]
    ) -> list[Slot]:
        """Recorded slots for a recipe of this shape, made once."""
        capacity = max((-(-mask.numel() // 8192) * 8192 for mask in masks if mask is not None), default=0)
        plain = {
            "name": "",
            "rate": 0.0,
            "decay": 0.0,
            "smooth": 0.0,
            "avoid": False,
            "relative": False,
            "density": 0.0,
            "cap": 1.0,
        }
        key = (replace(recipe, **plain, mask="", budget=""), capacity)
        bank = self.bank(recipe.beside) if recipe.beside else None
        if key not in self.slots and len(self.slots) > 1:
            del self.slots[next(iter(self.slots))]
        held = self.slots.setdefault(key, [])
        for lesson, mask in list(zip(lessons, masks, strict=True))[len(held) :]:
            slot = Slot(self.objective, recipe, lesson, draws, bank, capacity)
            slot.load(recipe, lesson, draws, mask, 0)
            slot.record()
            held.append(slot)
        return held[: len(lessons)]

    def _rehearsed(self, lesson: Lesson, change: Tensor, count: int) -> Lesson:
        """A lesson with what its adapter draws of concepts that some style teaches: none that anything is judged on."""
        names, drawn, texts = taught_concepts(), [], []
        own = torch.Generator().manual_seed(3)
        sampler = self.sampler(2 if self.toy else 48)
        for start in range(0, count, sampler.count):
            numbers = range(start, start + sampler.count)
            wanted = [CONCEPTS[CONCEPT_INDEX[names[i % len(names)]]] for i in numbers]
            text = self.world.text(
                [caption(c, BACKGROUND_NAMES[7 * i % 16]) for i, c in zip(numbers, wanted, strict=True)]
            )
            noise = torch.randn((sampler.count, 4, 16, 16), generator=own).to(text.device)
            asked = Prompts(text, torch.zeros(sampler.count, dtype=torch.long, device=text.device), noise)
            sampler.draw(asked, always(REHEARSAL_STRENGTH * change))
            drawn.append(sampler.latents.clone())
            texts.append(text)
        new = torch.cat(drawn)
        return Lesson(
            torch.cat([lesson.latents, torch.stack([new, new.flip(3)])], 1), torch.cat([lesson.texts, *texts])
        )

    def examine(self, changes: dict[str, Tensor], exam: Exam) -> list[Row]:
        """Judge single adapters and mixes."""
        rows = [self._row(exam, (), "base", (), always(None))]
        for names in [*((name,) for name in changes), *mixes(exam, changes)]:
            levels = [(s,) * len(names) for s in (exam.mixed if len(names) > 1 else exam.single)]
            levels += list(exam.uneven) if len(names) == 2 else []
            for method, strengths in itertools.product(exam.methods, levels):
                schedule = METHODS[method]([changes[name] for name in names], strengths, self.layout)
                rows.append(self._row(exam, names, method, strengths, schedule))
        return rows

    def _row(self, exam: Exam, names: tuple[str, ...], method: str, strengths: tuple[float, ...], schedule: Any) -> Row:
        prompts = self.prompts(exam.split, exam.count, SUBJECT in names)
        verdict, _ = self.sampler(exam.count).draw(prompts, schedule)
        return {"mix": "+".join(names), "method": method, "strengths": list(strengths), **bits(names, verdict)}


def mixes(exam: Exam, changes: dict[str, Tensor]) -> list[tuple[str, ...]]:
    """Which adapters are mixed: all pairs and so on of the exam's styles, and the subject with each."""
    styles = [name for name in exam.styles if name in changes]
    found = [names for size in exam.sizes for names in itertools.combinations(styles, size)]
    return found + [(SUBJECT, style) for style in styles if exam.subject and SUBJECT in changes]


def bits(names: tuple[str, ...], verdict: Verdict) -> Row:
    """One hexadecimal digit string a question, a bit a picture; with the subject, "concept" is whether it is shown."""
    seen = verdict.sights > 0
    said = {name: seen[:, SIGHTS.index(name)] for name in names}
    concept = said.pop(SUBJECT) if SUBJECT in said else verdict.concept
    return {"concept": pack(concept), "seen": {name: pack(one) for name, one in said.items()}}


def pack(values: Tensor) -> str:
    """Bools ``[n]`` -> "n:hex"."""
    digits = "".join("01"[int(value)] for value in values.tolist())
    return f"{len(digits)}:{int(digits, 2):x}"


@torch.no_grad()
def kinship(changes: dict[str, Tensor], layout: Layout) -> list[Row]:
    """Measures of two adapters that may foretell how they mix.

    cosine of the changes; overlap (shared entries over the smaller one's); conflict (shared entries of opposite sign
    over shared ones); AWOM (P 4.2: the norm of A1^T A2 by weight, summed, over the product of norms) and its mirror
    A1 A2^T; the share of inputs and outputs (columns and rows) that both touch, by energy.
    """
    rows = []
    for first, second in itertools.combinations(changes, 2):
        a, b = changes[first], changes[second]
        both = (a != 0) & (b != 0)
        shared = int(both.sum())
        smaller = min(int((a != 0).sum()), int((b != 0).sum()))
        gram = [
            (float((x.T @ y).norm()), float((x @ y.T).norm()), float(x.norm() * y.norm()))
            for x, y in zip(_matrices(a, layout), _matrices(b, layout), strict=True)
        ]
        total = sum(part[2] for part in gram) + 1e-12
        rows.append(
            {
                "mix": f"{first}+{second}",
                "cosine": float(a @ b / (a.norm() * b.norm() + 1e-12)),
                "overlap": shared / max(1, smaller),
                "conflict": float((a[both].sign() != b[both].sign()).float().mean()) if shared else 0.0,
                "awom": sum(part[0] for part in gram) / total,
                "awom_rows": sum(part[1] for part in gram) / total,
            }
        )
    return [{key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()} for row in rows]


def _matrices(change: Tensor, layout: Layout) -> list[Tensor]:
    parts = change.split(layout.sizes)
    return [part.view(shape[0], -1) for part, shape in zip(parts, layout.shapes, strict=True) if len(shape) > 1]


def run_recipe(arena: Arena, recipe: Recipe, seed: int, exam: Exam) -> Row:
    """Everything about one recipe and seed, as it is kept in a file."""
    names = [*exam.styles, *([SUBJECT] if exam.subject else [])]
    began = time.monotonic()
    changes, losses = arena.train(recipe, seed, names)
    seconds = round(time.monotonic() - began, 1)
    norms = {name: round(float(change.norm()), 4) for name, change in changes.items()}
    values = {name: int((change != 0).sum()) for name, change in changes.items()}
    relations = kinship(changes, arena.layout)
    noise = arena.draws(2000, *((1, 2) if arena.toy else (8, 16)))
    effects = adapter_effects(arena.objective, arena.lesson("plain"), changes, noise)
    for row in relations:
        row |= {f"effects_{name}": round(value, 6) for name, value in effects[row["mix"]].items()}
    return {
        "recipe": asdict(recipe),
        "seed": seed,
        "exam": asdict(exam),
        "train_seconds": seconds,
        "losses": losses,
        "norms": norms,
        "changed": values,
        "kinship": relations,
        "rows": arena.examine(changes, exam),
    }
