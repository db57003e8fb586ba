"""The embedded base model: its world, how it is trained, and how its checkpoint is put together."""
