"""One question per script: ``python -m benchmarks.scripts.NAME`` measures it and writes JSON to benchmarks/results."""
