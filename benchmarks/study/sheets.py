"""Pictures of recipes beside each other: the first prompts of the test split, unpicked, the same noise for all."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.study.arena import Arena, Exam, mixes
from benchmarks.study.mixing import METHODS
from benchmarks.study.recipes import Recipe
from examples.emoji.judge_mixes import SIGHTS
from examples.emoji.sheet import contact_sheet

PICTURES_EACH = 4


def draw_sheet(arena: Arena, wanted: list[tuple[Recipe, float]], file: Path, styles: Sequence[str]) -> None:
    """A row a pair of styles; in it each recipe's pictures at its strength, labelled with what the judge sees."""
    exam = Exam("test", PICTURES_EACH, styles=tuple(styles[:2] if arena.toy else styles))
    prompts = arena.prompts(exam.split, exam.count, False)
    made = [(recipe, strength, arena.train(recipe, 0, exam.styles)[0]) for recipe, strength in wanted]
    pictures, labels = [], []
    for names in mixes(exam, made[0][2]):
        for recipe, strength, changes in made:
            schedule = METHODS["sum"]([changes[name] for name in names], [strength] * len(names), arena.layout)
            verdict, drawn = arena.sampler(exam.count).draw(prompts, schedule)
            pictures.append(drawn.cpu().clone())
            for sights, concept in zip(verdict.sights > 0, verdict.concept, strict=True):
                seen = "+".join(name[:5] for name in names if sights[SIGHTS.index(name)])
                labels.append(f"{recipe.name[:6]} {seen}{'' if bool(concept) else ' LOST'}")
    contact_sheet(torch.cat(pictures), labels, PICTURES_EACH * len(wanted), file)
