"""Train an adapter on a ComfyUI model."""
