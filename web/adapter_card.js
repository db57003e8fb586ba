// @ts-check
/** Load SA-Inject Adapter shows whom it loads; adapters are chosen by their faces, and can be dropped. */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { adapterCard, architectureOf } from "./lib/adapters.mjs";
import { mountAdapterCard } from "./lib/adapter_card.mjs";
import { pickAdapter } from "./lib/adapter_picker.mjs";
import { connectedCheckpoint } from "./lib/connected_model.mjs";
import { element, loadStyles } from "./lib/dom.mjs";
import { addLoadNode, takeDroppedAdapters } from "./lib/dropped_adapter.mjs";
import { addElement, after } from "./lib/node_widget.mjs";
import { say, wordsLoaded } from "./lib/words.mjs";

const NODE = "LoadSAInjectAdapter";
const HEIGHT = 136;
const SETTLED_AFTER = 250; // milliseconds without another change

/** @type {Set<() => void>} */
const refreshers = new Set();
/** @type {number | undefined} */
let waiting;

function refreshSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(() => refreshers.forEach((refresh) => refresh()), SETTLED_AFTER);
}

/** @param {any} node */
function addCard(node) {
  const file = node.widgets?.find((/** @type {any} */ widget) => widget.name === "adapter_name");
  if (!file) return;
  const container = element("div");
  /** @type {ReturnType<typeof mountAdapterCard> | undefined} */
  let card;
  let asked = 0;

  async function choose() {
    const name = await pickAdapter();
    if (name) take(name);
  }

  /** @param {string} name */
  function take(name) {
    const options = file.options?.values;
    if (Array.isArray(options) && !options.includes(name)) options.push(name); // it came after the page
    file.value = name;
    file.callback?.(name);
    node.setDirtyCanvas?.(true, true);
  }

  async function refresh() {
    const mine = ++asked;
    await wordsLoaded();
    const found = file.value ? await adapterCard(file.value) : null;
    const misfit = found?.architecture ? await whyMisfit(node, found.architecture) : null;
    if (mine !== asked) return;
    card ??= mountAdapterCard(container, { choose, take });
    card.show(found, misfit);
  }

  addElement(node, "sa_inject_card", "sa_inject_card", container, HEIGHT);
  after(file, "callback", refresh);
  after(node, "onConfigure", refresh);
  after(node, "onConnectionsChange", refreshSoon);
  after(node, "onRemoved", () => {
    refreshers.delete(refresh);
    card?.destroy();
  });
  refreshers.add(refresh);
  refresh();
}

/**
 * @param {any} node
 * @param {string} trained
 */
async function whyMisfit(node, trained) {
  const checkpoint = connectedCheckpoint(node);
  const model = checkpoint && (await architectureOf(checkpoint));
  return model && model !== trained ? say("card.misfit", { trained, model }) : null;
}

async function chooseAndAdd() {
  await wordsLoaded();
  const name = await pickAdapter();
  if (name) addLoadNode(name);
}

app.registerExtension({
  name: "sa_inject.adapter_card",
  commands: [{ id: "SAInject.AddAdapter", label: "Add an SA-Inject adapter", icon: "pi pi-user-plus", function: chooseAndAdd }],
  menuCommands: [{ path: ["Extensions", "SA-Inject"], commands: ["SAInject.AddAdapter"] }],
  getCanvasMenuItems: () => [{ content: say("menu.addAdapter"), callback: () => void chooseAndAdd() }],
  async setup() {
    loadStyles();
    takeDroppedAdapters();
    api.addEventListener("graphChanged", refreshSoon);
    await wordsLoaded();
  },
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass === NODE) addCard(node);
  },
});
