"""A soak test: random operations, errors at any tensor operation, mutated files.

The short version runs with the suite (``test_soak.py``), the long one with ``make soak`` (``python -m tests.soak``),
which writes ``benchmarks/results/soak.json``. It uses public names only, so that it outlives any restructuring.
"""
