"""How ComfyUI is asked to do it: the only home of its quirks."""
