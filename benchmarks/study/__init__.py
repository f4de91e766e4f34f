"""How styles mix: adapters of several methods, trained alike on the demo model's styles and judged when mixed.

python -m benchmarks.study --help
"""
