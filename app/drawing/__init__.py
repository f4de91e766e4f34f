"""Draws pictures on the resident pipeline: one thread, visitors take turns, any of them may stop."""
