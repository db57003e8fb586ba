"""How an adapter is learned, given something that denoises. No ComfyUI in here."""
