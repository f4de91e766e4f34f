"""Trains adapters in a process beside the app, and follows its log."""
