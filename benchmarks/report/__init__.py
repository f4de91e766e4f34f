"""docs/benchmarks.md with its plots, and the tables of README.md and docs/training.md, from benchmarks/results.

``python -m benchmarks.report`` writes them; ``--check`` only lists the stale ones. No figure is written by hand, so
none can claim what was not measured. From the ground up: ``results`` (the files), ``tables``, ``targets`` (what should
be reached), ``plots``, ``page``. All prose, and the columns of the tables, are in ``descriptions.toml``.
"""
