"""Texts and progress shown on a node while it runs."""

from __future__ import annotations

import logging

from server import PromptServer

log = logging.getLogger(__name__)


def show_on_node(text: str, node_id: str | None) -> None:
    """Show a line of text on a node, if a browser is connected."""
    if node_id is not None and getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.send_progress_text(text, node_id)


def warn_on_node(message: str, node_id: str | None) -> None:
    """Log a warning and show it on the node, there with a capital first letter, except for an input's name."""
    log.warning("SA-Inject: %s", message)
    is_input = "_" in message.partition(" ")[0]
    show_on_node(message if is_input else message[0].upper() + message[1:], node_id)
