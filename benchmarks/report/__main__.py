"""python -m benchmarks.report [--check]"""

import argparse
import sys

from benchmarks.report.files import DOCUMENTS, stale, write_all
from benchmarks.report.results import Figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pages, tables and plots that come from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if any is stale")
    args = parser.parse_args()
    figures = Figures()
    if args.check:
        found = stale(figures)
        sys.exit(f"stale, run python -m benchmarks.report: {', '.join(found)}" if found else 0)
    write_all(figures)
    print("\n".join(str(path) for path in DOCUMENTS))


if __name__ == "__main__":
    main()
