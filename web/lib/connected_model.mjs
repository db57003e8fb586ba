// @ts-check
/** The checkpoint that an adapter is going to be used with, as far as the graph tells. */

const LOADERS = /** @type {const} */ ([
  ["ckpt_name", "checkpoints"],
  ["unet_name", "diffusion_models"],
]);
const FURTHEST = 50; // nodes; a graph may be a circle while it is edited

/**
 * @param {any} node Load SA-Inject Adapter
 * @returns {{folder: string, name: string} | null}
 */
export function connectedCheckpoint(node) {
  const targets = node.outputs?.flatMap((/** @type {any} */ _, /** @type {number} */ slot) => node.getOutputNodes(slot) ?? []);
  for (const target of targets ?? []) {
    const found = upstream(target, "MODEL");
    if (found) return found;
  }
  return upstream(node, "CLIP");
}

/**
 * @param {any} node
 * @param {string} type of the input to follow
 * @returns {{folder: string, name: string} | null}
 */
function upstream(node, type) {
  let at = node;
  for (let far = 0; at && far < FURTHEST; far++) {
    const from = at;
    const slots = [...(from.inputs?.keys() ?? [])].filter((slot) => from.isInputConnected(slot));
    const slot = slots.find((slot) => from.inputs[slot].type === type) ?? slots[0];
    at = slot === undefined ? null : from.getInputNode(slot);
    const found = LOADERS.map(([widget, folder]) => ({ folder, name: valueOf(at, widget) })).find(({ name }) => name);
    if (found) return /** @type {{folder: string, name: string}} */ (found);
  }
  return null;
}

/**
 * @param {any} node
 * @param {string} name
 * @returns {string | undefined}
 */
const valueOf = (node, name) => node?.widgets?.find((/** @type {any} */ widget) => widget.name === name)?.value;
