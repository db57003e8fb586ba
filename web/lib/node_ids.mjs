// @ts-check
/** How the server names a node: its number, behind those of the subgraphs that it lies in ("5:12"). */
import { app } from "../../../scripts/app.js";

/** @param {any} node @returns {string} */
export function executionIdOf(node) {
  const root = /** @type {any} */ (app).rootGraph ?? app.graph;
  return pathTo(root, node) ?? String(node.id);
}

/**
 * @param {any} graph
 * @param {any} node
 * @returns {string | null}
 */
function pathTo(graph, node) {
  if (!graph) return null;
  if (node.graph === graph) return String(node.id);
  for (const outer of graph._nodes ?? graph.nodes ?? []) {
    const inside = outer.subgraph ? pathTo(outer.subgraph, node) : null;
    if (inside) return `${outer.id}:${inside}`;
  }
  return null;
}
