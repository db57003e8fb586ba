"""Reference pictures of the demo's subject."""
