"""Everything that uses ComfyUI's own modules."""
