"""The demo: a base model small enough to ship, and pictures to personalise it with."""
