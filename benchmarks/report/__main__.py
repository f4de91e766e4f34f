"""Write the documents from the results, or check that they are current: ``python -m benchmarks.report [--check]``."""

import argparse
import sys

from benchmarks.report.page import DOCUMENTS, stale, write_all
from benchmarks.report.results import Results


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pages, tables and plots that come from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if any is stale")
    if not parser.parse_args().check:
        write_all(Results())
        print("\n".join(map(str, DOCUMENTS)))
    elif found := stale(Results()):
        sys.exit(f"stale, run python -m benchmarks.report: {', '.join(found)}")


if __name__ == "__main__":
    main()
