// @ts-check
/** An adapter dropped with the Alt key becomes a node that loads it. Without the key the host opens its graph. */
import { app } from "../../../scripts/app.js";
import { adapterCards, shortName } from "./adapters.mjs";
import { tell } from "./toast.mjs";
import { say, wordsLoaded } from "./words.mjs";

const NODE = "LoadSAInjectAdapter";

/**
 * @param {string} name as the host lists it
 * @param {[number, number]} [at] in the graph
 */
export function addLoadNode(name, at) {
  const lite = /** @type {any} */ (globalThis).LiteGraph;
  const node = lite.createNode(NODE);
  if (!node) return;
  node.pos = at ?? middleOfView();
  app.canvas.graph?.add(node);
  const file = node.widgets?.find((/** @type {any} */ widget) => widget.name === "adapter_name");
  const options = file?.options?.values;
  if (Array.isArray(options) && !options.includes(name)) options.push(name);
  file.value = name;
  file.callback?.(name);
}

export function takeDroppedAdapters() {
  document.addEventListener("drop", take, { capture: true });
}

/** @param {DragEvent} event */
function take(event) {
  const file = [...(event.dataTransfer?.files ?? [])].find((one) => one.name.endsWith(".safetensors"));
  if (!event.altKey || !file || !(event.target instanceof HTMLCanvasElement || inGraph(event.target))) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  addDropped(file, app.canvas.convertEventToCanvasOffset(event));
}

/** Nodes 2.0 lays its own elements over the canvas. @param {EventTarget | null} target */
const inGraph = (target) => target instanceof Element && target.closest("#graph-canvas-container, .graph-canvas-container, [data-testid='transform-pane']") !== null;

/**
 * @param {File} file
 * @param {[number, number]} at
 */
async function addDropped(file, at) {
  await wordsLoaded();
  const cards = await adapterCards();
  const found = cards.find((card) => `${shortName(card.name)}.safetensors` === file.name && card.bytes === file.size);
  if (found) addLoadNode(found.name, at);
  else tell("warn", say("drop.notInFolder", { name: file.name }));
}

/** @returns {[number, number]} */
function middleOfView() {
  const [x, y, wide, tall] = app.canvas.visible_area;
  return [x + wide / 2 - 150, y + tall / 2 - 100];
}
