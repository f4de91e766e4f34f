"""docs/benchmarks.md with its plots, and the tables of README.md and docs/training.md, from benchmarks/results.

``python -m benchmarks.report`` writes them; ``--check`` only says which are stale. Nothing in them is written by hand,
so that none can say what was not measured. From the ground up: ``cells`` (a figure as text), ``figures`` (the files of
results), ``tables``, ``bars`` with ``aims`` (what should be reached), ``sections`` (what each script asks),
``series`` and ``plots``, ``readme`` and ``training`` (tables elsewhere), ``page``.
"""
