"""Converts a saved workflow to the prompt that the frontend would queue.

It is stricter than the frontend. A shipped workflow must match its nodes. So a node that the host does not have is an
error, and so are values that do not fit its widgets.
"""

from typing import Any, NamedTuple

Workflow = dict[str, Any]

MUTED, BYPASSED = 2, 4
NOTES = {"Note", "MarkdownNote"}
VIRTUAL = {*NOTES, "Reroute", "PrimitiveNode"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
UPLOADS = ("image_upload", "video_upload", "animated_image_upload", "audio_upload")


class Link(NamedTuple):
    node: Any
    slot: int


class Value(NamedTuple):
    """The value of a PrimitiveNode."""

    value: Any


def workflow_to_prompt(workflow: Workflow, object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if workflow.get("definitions", {}).get("subgraphs"):
        raise ValueError("the workflow has subgraphs, which this helper does not know")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = dict(read_link(link) for link in workflow["links"])
    prompt = {}
    for node_id, node in nodes.items():
        if node["type"] in VIRTUAL or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise ValueError(f"node {node_id}: the host has no {node['type']}")
        inputs = widget_values(node, object_info[node["type"]])
        for slot in node.get("inputs") or []:
            if slot.get("link") is None:
                continue
            origin = trace(slot["link"], nodes, links)
            if isinstance(origin, Value):
                inputs[slot["name"]] = origin.value
            elif origin is not None:
                inputs[slot["name"]] = [str(origin.node), origin.slot]
        prompt[str(node_id)] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def read_link(link: list | dict[str, Any]) -> tuple[Any, Link]:
    if isinstance(link, dict):
        return link["id"], Link(link["origin_id"], link["origin_slot"])
    return link[0], Link(link[1], link[2])


def trace(link_id: Any, nodes: dict[Any, dict], links: dict[Any, Link]) -> Link | Value | None:
    """Follow a link through reroutes and bypassed nodes to its source. None if it has none."""
    link = links[link_id]
    node = nodes[link.node]
    slots = node.get("inputs") or []
    if node["type"] == "PrimitiveNode":
        return Value(node["widgets_values"][0])
    if node.get("mode", 0) == MUTED:
        return None
    if node["type"] == "Reroute":
        through = slots[0].get("link")
    elif node.get("mode", 0) == BYPASSED:
        kind = node["outputs"][link.slot]["type"]
        opposite_first = [*slots[link.slot : link.slot + 1], *slots]
        through = next((slot.get("link") for slot in opposite_first if slot["type"] == kind), None)
    else:
        return link
    return None if through is None else trace(through, nodes, links)


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    saved = node.get("widgets_values") or []
    specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    order = [name for group in ("required", "optional") for name in info["input_order"].get(group, [])]
    widgets = {name: specs[name] for name in order if is_widget(specs[name])}
    if isinstance(saved, dict):
        return {name: saved[name] for name in widgets if name in saved}

    values, rest = {}, list(saved)
    for name, spec in widgets.items():
        options = spec[1] if len(spec) > 1 else {}
        if not rest:
            if name in info["input"].get("optional", {}) and "default" in options:
                continue  # saved before the node had this input, which is then left out or has its default
            raise ValueError(f"node {node['id']} ({node['type']}): no value for '{name}'")
        values[name] = rest.pop(0)
        if has_seed_control(name, spec[0], options) and rest:
            rest.pop(0)
        if any(options.get(upload) for upload in UPLOADS) and rest and rest[0] == "image":
            rest.pop(0)  # the upload button
    if rest:
        raise ValueError(f"node {node['id']} ({node['type']}): {rest} left over after {list(values)}")
    return values


def is_widget(spec: list[Any]) -> bool:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def has_seed_control(name: str, kind: Any, options: dict[str, Any]) -> bool:
    """The widget "control after generate" that the frontend adds after seeds."""
    return bool(options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")))
