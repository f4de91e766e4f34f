"""Show how a training goes, as HTML: a headline, a bar, and the curve of its loss."""

from collections.abc import Mapping
from html import escape

from app.training.estimate import Estimate
from app.training.trainings import Progress

WIDTH, HEIGHT, LEFT, BOTTOM = 560, 190, 44, 24  # of the curve, in SVG units
POINTS = 400  # drawn at most: more than the curve has pixels to show, and the page gets it every two seconds
SMOOTH = 0.9  # of the moving mean: losses of single steps depend on the noise level drawn, so they scatter widely


def estimate(expected: Estimate) -> str:
    """What a training will take, in a line of figures."""
    how = "measured in the last training like it" if expected.measured else "estimated from how fast pictures are drawn"
    figures = [
        (f"{expected.entries:,}", "entries"),
        (f"{expected.megabytes:.2g} MB", "file"),
        (f"about {duration(expected.seconds)}", "time"),
        (f"{expected.memory_gib:.1f} GiB", "memory beside the app's"),
    ]
    cells = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in figures)
    return f'<div class="figures">{cells}</div><p class="remark">Time and memory are {how}.</p>'


def progress(state: Progress) -> str:
    """Headline, bar and curve of a training."""
    training, recipe, done = state.training, state.training.recipe, state.steps.done
    share = 100 * done / recipe.steps
    bar = (
        f'<div class="bar" role="progressbar" aria-label="steps done" aria-valuemin="0" aria-valuemax="{recipe.steps}" '
        f'aria-valuenow="{done}"><span style="width:{share:.1f}%"></span></div>'
    )
    facts = f"step {done} of {recipe.steps}"
    if state.steps.losses:
        facts += f" · loss {smoothed(state.steps.losses)[done]:.3f} · {state.steps.speed:.1f} pictures per second"
    if state.seconds_left is not None:
        facts += f" · about {duration(state.seconds_left)} left"
    headline = f'<h3>{escape(recipe.name)} <span class="state {training.state}">{training.state}</span></h3>'
    return f"{headline}<p>{escape(_sentence(state))}</p>{bar}<p class='remark'>{facts}</p>{curve(state.steps.losses)}"


def _sentence(state: Progress) -> str:
    training = state.training
    at = f"from step {state.checkpoint}" if state.checkpoint else "from the beginning"
    if training.state == "finished":
        return f"The adapter is in the library as “{training.adapter}” and can be mixed."
    if training.state == "failed":
        return f"{training.problem[:1].upper()}{training.problem[1:]}. It can be resumed {at}."
    if training.state == "running":
        onward = f" It goes on {at}." if state.steps.done else ""
        ready = f"Getting ready: the trainer loads the model and looks at the pictures.{onward}"
        return ready if state.loading else "Learning."
    kept = f" What it had learned is in the library as “{training.adapter}”." if training.adapter else ""
    why = "It was cancelled" if training.state == "cancelled" else "The app was closed while it trained"
    return f"{why}. It can be resumed {at}.{kept}"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def smoothed(losses: Mapping[int, float]) -> dict[int, float]:
    """The moving mean of the losses, by step."""
    mean, weight, result = 0.0, 0.0, {}
    for step, loss in losses.items():
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * loss, SMOOTH * weight + 1 - SMOOTH
        result[step] = mean / weight
    return result


def curve(losses: Mapping[int, float]) -> str:
    """The loss over the steps as an SVG: each step's faintly, their moving mean in front. Nothing before two steps."""
    if len(losses) < 2:
        return ""
    mean = smoothed(losses)
    first, last = min(losses), max(losses)
    top = max(sorted(losses.values())[int(0.98 * (len(losses) - 1))], *mean.values()) * 1.1 or 1.0

    def points(values: Mapping[int, float]) -> str:
        every = max(1, len(values) // POINTS)
        steps = [*list(values)[::every], last]
        return " ".join(
            f"{LEFT + (WIDTH - LEFT) * (step - first) / (last - first):.1f},"
            f"{(HEIGHT - BOTTOM) * (1 - min(values[step], top) / top):.1f}"
            for step in dict.fromkeys(steps)
        )

    label = f"loss from step {first} to {last}: at first {mean[first]:.3f}, now {mean[last]:.3f}"
    marks = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.0f}" y2="{y:.0f}"/><text x="{LEFT - 6}" y="{y + 4:.0f}" '
        f'text-anchor="end">{top * (1 - y / (HEIGHT - BOTTOM)):.2f}</text>'
        for y in (HEIGHT * 0.1, (HEIGHT - BOTTOM) / 2, HEIGHT - BOTTOM)
    )
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{marks}'
        f'<text x="{LEFT}" y="{HEIGHT - 4}">step {first}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{last}</text>'
        f'<polyline class="raw" points="{points(losses)}"/><polyline class="mean" points="{points(mean)}"/></svg>'
    )
