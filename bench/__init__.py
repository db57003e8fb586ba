"""Measurements. `run.py` runs them; README.md describes each one."""
