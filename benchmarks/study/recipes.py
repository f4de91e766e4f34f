"""The methods compared: how an adapter is made, in one table."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained.

    Args:
        name: what results are filed under.
        kind: "lora", or "shira".
        rate: peak learning rate of AdamW, cosine to zero.
        rank: of a LoRA; its scale is 1.
        density: of a SHiRA: entries of each targeted weight.
        mask: a name in `masks.SCORES`, or "struct" or "struct_rows".
        budget: "weight" (the same density in each) or "global" (the highest scores of all).
        cap: with a global budget, the largest share of any one weight that is trained; 1 is no limit.
        targets: a name in `flat.TARGETS`.
        avoid: keep off the entries of styles that come before.
        steps, batch, decay: of the optimizer.
        smooth: of AdamW's denominator, in means of it over all values: 0 is AdamW, a large one is momentum with one
            rate for all.
        dropout: share of the entries left out of each step at random, the others scaled up, so that none relies on
            another.
        average: keep the mean of the values over the last half of the steps instead of the last ones.
        relative: train entries in units of their weight's standard deviation.
        rehearse: pictures that adapters of a first training draw themselves, of concepts that other styles teach, for
            a second training beside the true pictures; 0 is one training.
        sharpness: radius of SAM's ascent step, 0 is off. (arXiv 2010.01412)
        beside: "" or who else is active while training: "ghosts" (a library's values at random entries), "looks"
            (adapters of the base's own looks).
        additive: weight of the loss that asks the effect to be the same beside others as alone; needs `beside`.
        under: whether the picture loss itself is taken beside others; needs `beside`.
    """

    name: str
    kind: str
    rate: float
    rank: int = 0
    density: float = 0.02
    mask: str = "grad"
    budget: str = "weight"
    cap: float = 1.0
    targets: str = "all"
    avoid: bool = False
    steps: int = 400
    batch: int = 16
    decay: float = 0.01
    smooth: float = 0.0
    dropout: float = 0.0
    average: bool = False
    relative: bool = False
    rehearse: int = 0
    sharpness: float = 0.0
    beside: str = ""
    additive: float = 0.0
    under: bool = False

    def at(self, rate: float) -> "Recipe":
        """The same at another learning rate."""
        return replace(self, rate=rate, name=f"{self.name}@{rate:g}")


def lora(name: str, rank: int, rate: float, **more: object) -> Recipe:
    return Recipe(name, "lora", rate, rank=rank, **more)  # type: ignore[arg-type]


def shira(name: str, rate: float = 3e-3, **more: object) -> Recipe:
    return Recipe(name, "shira", rate, **more)  # type: ignore[arg-type]
