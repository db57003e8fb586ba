"""A pack for `dev.py serve`: the page opens with the demo's workflow, ready to run."""

NODE_CLASS_MAPPINGS: dict = {}
WEB_DIRECTORY = "./web"
