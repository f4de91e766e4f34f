"""Measurements, one question a script; each writes ``results/<name>.json`` with machine, versions and commit."""
