// @ts-check
/** Opens the workflow that trains and draws, with the values for the demo's model. Once: a reload keeps what was changed. */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const WORKFLOW = "/workflow_templates/sa-inject/train_then_apply.json";
const OPENED = "sa-inject-demo-opened";
const READY_WITHIN = 10_000; // milliseconds
const EVERY = 100;

/** @param {string} path */
const json = async (path) => (await api.fetchApi(path)).json();

/** The frontend opens a workflow of its own first, and ours would be lost if it came before. */
async function firstWorkflowIsOpen() {
  for (let waited = 0; waited < READY_WITHIN && !app.graph?._nodes?.length; waited += EVERY) {
    await new Promise((resolve) => setTimeout(resolve, EVERY));
  }
}

async function openWorkflow() {
  const settings = await (await fetch(new URL("settings.json", import.meta.url))).json();
  const workflow = await json(WORKFLOW);
  await firstWorkflowIsOpen();
  await app.loadGraphData(workflow, true, true, "SA-Inject demo");
  for (const node of app.graph._nodes) {
    const values = { ...settings[node.type], ...settings[node.title] };
    for (const widget of node.widgets ?? []) {
      if (!(widget.name in values)) continue;
      widget.value = values[widget.name];
      widget.callback?.(widget.value);
    }
  }
  sessionStorage.setItem(OPENED, "yes");
}

app.registerExtension({
  name: "sa_inject.demo",
  setup() {
    if (!sessionStorage.getItem(OPENED)) openWorkflow(); // not awaited: the frontend waits for setup
  },
});
