"""What an adapter is and does: torch, peft and safetensors, and no ComfyUI."""
