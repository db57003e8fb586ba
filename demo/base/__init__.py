"""The embedded base model: its scenes, its training, and how its checkpoint is put together."""
