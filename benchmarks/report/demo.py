"""The demo model's figures, as a table."""

from benchmarks.report import cells
from benchmarks.report.results import Row
from benchmarks.report.tables import markdown


def demo_table(row: Row) -> str:
    switches, picture = row["random_switches"], row["picture"]
    lines = {f"A switch, {kind}, ms": cells.spread(taken) for kind, taken in switches["by_kind"].items()}
    lines["Random switches, and adapters in them"] = f"{switches['count']:,}, {len(row['adapters'])}"
    lines["Parameters whose bits differ from the base's afterwards"] = cells.cell(switches["parameters_that_differ"])
    lines["Share of all weights that one adapter changes"] = cells.percent(
        switches["share_of_weights_one_adapter_changes"]
    )
    lines["A picture, base, ms"] = cells.spread(picture["base"])
    lines["A picture after a switch, the switch included, ms"] = cells.spread(picture["after_a_switch"])
    return markdown({"What": list(lines), "Measured": list(lines.values())})
