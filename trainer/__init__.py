"""Training of an adapter, given a denoiser. It does not know ComfyUI."""
