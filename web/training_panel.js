// @ts-check
/** The training node shows its run: live, after a reload, in a second tab, and from a finished or a cached run. */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { element, loadStyles } from "./lib/dom.mjs";
import { executionIdOf } from "./lib/node_ids.mjs";
import { addElement, after } from "./lib/node_widget.mjs";
import { ask, fetchRun } from "./lib/runs.mjs";
import { RunState } from "./lib/run_state.mjs";
import { tell } from "./lib/toast.mjs";
import { mountTrainingView } from "./lib/training_view.mjs";
import { say, wordsLoaded } from "./lib/words.mjs";

const NODE = "TrainSAInjectAdapter";
const RESULT = "sa_inject_training"; // in the node's output
const SHOW = /** @type {any} */ ("SAInject.ShowTrainingPanel"); // the types know the frontend's own settings only
const HEIGHT = 400;
const WIDTH = 380;
const SILENT_FOR = 3000; // milliseconds without an event, after which a run is asked for

/** @type {Set<Panel>} */
const panels = new Set();

class Panel {
  /** @param {any} node */
  constructor(node) {
    this.node = node;
    this.heard = 0; // when an event came last
    /** @type {{name: string, events: any[]} | null} the question that has no answer yet, and what was heard meanwhile */
    this.question = null;
    this.container = element("div");
    this.state = new RunState(() => this.show());
    addElement(node, "sa_inject_panel", "sa_inject_panel", this.container, HEIGHT);
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
    const fileName = node.widgets.find((/** @type {any} */ widget) => widget.name === "file_name");
    if (fileName) after(fileName, "callback", () => this.refetch(true));
    after(node, "onConfigure", () => this.refetch(true));
    after(node, "onExecuted", (output) => this.takeResult(output));
    after(node, "onRemoved", () => this.destroy());
    panels.add(this);
    this.start();
  }

  async start() {
    await wordsLoaded();
    this.view = mountTrainingView(this.container, { finish: () => this.ask("finish"), sample: () => this.ask("sample") });
    this.show();
    await this.refetch(true);
  }

  show() {
    this.view?.show(this.state.data, this.state.isActive);
  }

  /** The run that the node makes: the one heard of last, or that of its file name. @param {boolean} byName */
  runName(byName) {
    const widget = this.node.widgets?.find((/** @type {any} */ one) => one.name === "file_name");
    const named = String(widget?.value ?? "").trim().replace(/\.safetensors$/i, "");
    return byName || !this.state.data ? named : this.state.data.run;
  }

  /** @param {boolean} [byName] */
  async refetch(byName = false) {
    const name = this.runName(byName);
    if (this.question?.name === name) return;
    const question = { name, events: [] };
    this.question = question;
    const run = name ? await fetchRun(name) : null;
    if (question !== this.question) return; // it has been asked again, or the node has a result
    this.question = null;
    if (!run) {
      if (byName && this.state.data?.run !== name) this.state.forget();
    } else if (this.state.take(run, question.events)) await this.refetch();
  }

  /** @param {import("./lib/run_state.mjs").Event} event */
  follow(event) {
    this.question?.events.push(event);
    if (this.state.follow(event)) this.refetch();
    if (this.state.data?.updated_at === event.updated_at) this.heard = performance.now();
  }

  /** @param {any} output */
  takeResult(output) {
    const run = output?.[RESULT]?.[0];
    if (!run) return;
    this.question = null;
    this.state.take(run);
  }

  /** Somebody else's run has no events here, nor has ours while the connection is lost. */
  poll() {
    if (this.state.isActive && performance.now() - this.heard > SILENT_FOR) this.refetch();
  }

  /** @param {"finish" | "sample"} wish */
  async ask(wish) {
    const why = await ask(this.runName(false), wish);
    if (why) tell("warn", why);
    else tell("info", say(`panel.${wish}Asked`));
  }

  destroy() {
    panels.delete(this);
    this.view?.destroy();
  }
}

// At once, not in setup(): the frontend warns of a message that nobody has asked for.
/** @type {EventTarget} */ (api).addEventListener("sa_inject.training", (/** @type {any} */ { detail }) => {
  for (const panel of panels) if (executionIdOf(panel.node) === String(detail.node)) panel.follow(detail);
});
api.addEventListener("reconnected", refetchAll);
api.addEventListener("status", ({ detail }) => {
  // Another tab, or the API, may have queued a training.
  if (/** @type {any} */ (detail)?.exec_info?.queue_remaining) setTimeout(() => panels.forEach((panel) => !panel.state.isActive && panel.refetch()), SILENT_FOR);
});
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && refetchAll());

function refetchAll() {
  for (const panel of panels) {
    panel.question = null; // its answer may never come
    panel.refetch();
  }
}

const isShown = () => app.extensionManager?.setting?.get(SHOW) !== false;

app.registerExtension({
  name: "sa_inject.training_panel",
  settings: [
    {
      id: SHOW,
      name: "Show the training panel",
      tooltip: "Samples, loss and buttons on Train SA-Inject Adapter. Takes effect on nodes that are added or opened afterwards.",
      type: "boolean",
      defaultValue: true,
      category: ["SA-Inject", "Training", "Panel"],
    },
  ],
  async setup() {
    loadStyles();
    setInterval(() => panels.forEach((panel) => panel.poll()), SILENT_FOR);
    await wordsLoaded();
  },
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass === NODE && isShown()) new Panel(node);
  },
  onNodeOutputsUpdated(/** @type {Record<string, any>} */ outputs) {
    // A workflow was opened, or its tab was chosen: the frontend remembers what its nodes have shown.
    for (const panel of panels) if (!panel.state.data) panel.takeResult(outputs[executionIdOf(panel.node)]);
  },
});
