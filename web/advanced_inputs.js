// @ts-check
/** The classic renderer hides advanced inputs too: it asks the widget, where the frontend marks the options only. */
import { app } from "../../scripts/app.js";

const OURS = /SAInject|SelfAttnInjection|EncodeImagePrompt/;

app.registerExtension({
  name: "sa_inject.advanced_inputs",
  nodeCreated(/** @type {any} */ node) {
    if (!OURS.test(node.comfyClass ?? "")) return;
    for (const widget of node.widgets ?? []) if (widget.options?.advanced) widget.advanced = true;
  },
});
