"""Sampling with an adapter: the reference pass, and the injection of what it gives."""
