"""Keeps what visitors drew, with the settings in each picture, and their presets."""
