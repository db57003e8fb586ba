// @ts-check
/** An element as the last widget of a node: in both renderers, never in a prompt and never in a saved workflow. */

/**
 * @param {any} node
 * @param {string} name
 * @param {string} type of our own, or Vue puts its own widget there
 * @param {HTMLElement} shown
 * @param {number} height the least, in pixels; the style sheet must say the same
 * @returns {any}
 */
export function addElement(node, name, type, shown, height) {
  shown.classList.add("sa-inject");
  shown.style.minHeight = `${height}px`; // Nodes 2.0 lets an element without one collapse
  for (const event of ["pointerdown", "mousedown", "dblclick", "contextmenu"]) {
    shown.addEventListener(event, keepFromCanvas);
  }
  shown.addEventListener("wheel", passWheelOn, { passive: false });
  const widget = node.addDOMWidget(name, type, shown, {
    serialize: false, // keeps it out of the prompt
    hideOnZoom: false,
    getMinHeight: () => height,
  });
  widget.serialize = false; // keeps it out of widgets_values
  after(node, "onSerialize", (saved) => cutValues(saved, node.widgets.indexOf(widget)));
  const [wide, tall] = node.computeSize();
  node.setSize([Math.max(node.size[0], wide), Math.max(node.size[1], tall)]);
  takeOverPlace({ node, type, shown });
  return widget;
}

/**
 * Save the inputs' values and no more. The host adds the line of text below a node as a value, behind a gap where our
 * element is. A list that has got longer may look like one of an older workflow, whose values stand in other places.
 * @param {any} saved
 * @param {number} count
 */
function cutValues(saved, count) {
  if (count >= 0 && saved.widgets_values?.length > count) saved.widgets_values.length = count;
}

const LOOK_AFTER = [50, 300, 1000, 3000]; // milliseconds

/** @type {{node: any, type: string, shown: HTMLElement, removed?: boolean}[]} */
const shownBefore = [];

/**
 * Nodes 2.0 of frontend 1.32.9 puts an element into its place only when the place is made. A workflow that is opened
 * again has nodes of the same numbers, so the places stay, with the elements of the nodes that are gone.
 * @param {{node: any, type: string, shown: HTMLElement, removed?: boolean}} mine
 */
function takeOverPlace(mine) {
  shownBefore.push(mine);
  const look = () => {
    const old = shownBefore.find(
      (one) => one !== mine && one.type === mine.type && one.node.id === mine.node.id && one.shown.isConnected,
    );
    if (old?.removed && !mine.removed && !mine.shown.isConnected) old.shown.replaceWith(mine.shown);
  };
  for (const wait of LOOK_AFTER) setTimeout(look, wait);
  after(mine.node, "onRemoved", () => {
    mine.removed = true;
    // Long enough for the next node to find it.
    setTimeout(() => shownBefore.splice(shownBefore.indexOf(mine), 1), 2 * Math.max(...LOOK_AFTER));
  });
}

/**
 * A press on a button must not drag the node; a press on the ground may.
 * @param {Event} event
 */
function keepFromCanvas(event) {
  const target = /** @type {HTMLElement} */ (event.target);
  if (target.closest("button, select, input, a, canvas, [data-held]")) event.stopPropagation();
}

/**
 * The canvas zooms where nothing of ours scrolls.
 * @param {WheelEvent} event
 */
function passWheelOn(event) {
  const target = /** @type {HTMLElement} */ (event.target);
  if (!event.ctrlKey && target.closest("[data-scrolls]")) {
    event.stopPropagation();
    return;
  }
  const canvas = document.querySelector("#graph-canvas, canvas.lgraphcanvas, #graph-canvas-container canvas");
  if (!canvas) return;
  event.preventDefault();
  event.stopPropagation();
  canvas.dispatchEvent(new WheelEvent("wheel", event));
}

/**
 * Call `also` after a method of the node, whoever has put it there.
 * @param {any} node
 * @param {string} method
 * @param {(...inputs: any[]) => void} also
 */
export function after(node, method, also) {
  const earlier = node[method];
  node[method] = function (/** @type {any[]} */ ...inputs) {
    const result = earlier?.apply(this, inputs);
    also.apply(this, inputs);
    return result;
  };
}
