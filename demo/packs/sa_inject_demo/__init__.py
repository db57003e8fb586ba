"""What `dev.py serve` puts beside the pack: the page opens with the demo's workflow, ready to run."""

NODE_CLASS_MAPPINGS: dict = {}
WEB_DIRECTORY = "./web"
