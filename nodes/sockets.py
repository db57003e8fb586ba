"""Our socket types, and the nodes' category in the menu."""

from comfy_api.latest import io

CATEGORY = "SA-Inject"
SA_INJECT_ADAPTER = io.Custom("SA_INJECT_ADAPTER")
IMAGE_PROMPT = io.Custom("IMAGE_PROMPT")
SA_INJECT_TRAINING_SETTINGS = io.Custom("SA_INJECT_TRAINING_SETTINGS")
