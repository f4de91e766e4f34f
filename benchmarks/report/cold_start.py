"""The parts of a cold start as a table: a row a part, a column a file."""

from benchmarks.report import cells
from benchmarks.report.results import Result
from benchmarks.report.tables import HIDDEN, markdown, measured

PARTS = {
    "file_bytes": "The file",
    "disk": "Read it from disk, ms",
    "read": "Read it from the page cache, ms",
    "pin": "Lock its memory for the GPU, ms",
    "parse": "Read and parse its header, ms",
    "copy": "Copy it to the GPU, ms",
    "decode": "Decode it (on a GPU with the copy), ms",
    "decode_one_thread": "Decode it with one thread, ms",
    "check": "Check that values are finite (a part of decoding), ms",
    "fit": "Check names, shapes and the base, ms",
    "switch": "First switch: plan, save the bits, write, ms",
    "load_shira": "**Whole: `load_shira`, ms**",
    "library": "**Whole: `AdapterLibrary`, nothing kept, ms**",
    "packed": "**Whole: `AdapterLibrary`, the file's bytes in memory, ms**",
    "prefetched": "**Whole: `AdapterLibrary`, prefetched, ms**",
}
LABELS = ("model", "method", "family", "density", "entries")


def cold_start_table(result: Result) -> str:
    rows = measured(result.rows)
    keys = dict.fromkeys(
        key for key in (*PARTS, *(key for row in rows for key in row)) if any(key in row for row in rows)
    )
    shown = [key for key in keys if key not in (*LABELS, *HIDDEN)]
    columns = {"Part": [PARTS.get(key, cells.heading(key)) for key in shown]}
    for row in rows:
        name = f"{row['model']}, {row['family']}, {cells.percent(row['density'])}"
        columns[name] = [cells.size(row[key]) if key == "file_bytes" else cells.cell(row.get(key)) for key in shown]
    return markdown(columns)
