"""Measurements. `run.py` runs them, README.md says what each one asks."""
