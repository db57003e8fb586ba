// @ts-check
/** Pictures dropped on a node become a folder in `ComfyUI/input`, which the dataset node then reads. */
import { api } from "../../../scripts/api.js";
import { tell } from "./toast.mjs";
import { say, wordsLoaded } from "./words.mjs";

const DATASET = "LoadSAInjectDataset";
const OUTPUTS = ["images", "captions", "masks"];
const PICTURE = /\.(png|apng|jpe?g|jfif|webp|bmp|gif|tiff?|avif)$/i;
const BESIDE = /\.txt$/i; // a caption

/** @param {any} node Load SA-Inject Dataset or Train SA-Inject Adapter */
export function takeDroppedPictures(node) {
  const { onDragOver, onDragDrop } = node;
  node.onDragOver = function (/** @type {DragEvent} */ event) {
    return hasFiles(event) || Boolean(onDragOver?.call(this, event));
  };
  node.onDragDrop = async function (/** @type {DragEvent} */ event) {
    const files = [...(event.dataTransfer?.files ?? [])];
    if (!files.some((file) => PICTURE.test(file.name))) return Boolean(await onDragDrop?.call(this, event));
    await upload(files, node);
    return true;
  };
}

/** @param {DragEvent} event */
const hasFiles = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");

/**
 * @param {File[]} files
 * @param {any} node
 */
async function upload(files, node) {
  await wordsLoaded();
  const folder = `sa-inject-${new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-")}`;
  const wanted = files.filter((file) => PICTURE.test(file.name) || BESIDE.test(file.name));
  for (const file of wanted) {
    const why = await put(file, folder);
    if (why) {
      tell("error", say("pictures.refused", { name: file.name, why }));
      return;
    }
  }
  const widget = datasetOf(node)?.widgets?.find((/** @type {any} */ one) => one.name === "folder");
  if (!widget) return;
  if (Array.isArray(widget.options?.values) && !widget.options.values.includes(folder)) widget.options.values.push(folder);
  widget.value = folder;
  widget.callback?.(folder);
  const count = wanted.filter((file) => PICTURE.test(file.name)).length;
  tell("success", say("pictures.taken", { count, folder }));
}

/**
 * @param {File} file
 * @param {string} folder
 * @returns {Promise<string | null>} why the host did not take it
 */
async function put(file, folder) {
  const form = new FormData();
  form.append("image", file, file.name);
  form.append("type", "input");
  form.append("subfolder", folder);
  try {
    const reply = await api.fetchApi("/upload/image", { method: "POST", body: form });
    return reply.ok ? null : `${reply.status} ${reply.statusText}`;
  } catch (error) {
    return String(error);
  }
}

/** The dataset node that feeds this one, made and connected where there is none. @param {any} node */
function datasetOf(node) {
  if (node.comfyClass === DATASET) return node;
  const slot = node.inputs?.findIndex((/** @type {any} */ input) => input.name === "images");
  if (slot < 0) return null;
  const before = node.isInputConnected(slot) ? node.getInputNode(slot) : null;
  if (before?.comfyClass === DATASET) return before;
  const made = /** @type {any} */ (globalThis).LiteGraph.createNode(DATASET);
  if (!made) return null;
  made.pos = [node.pos[0] - made.size[0] - 60, node.pos[1]];
  node.graph.add(made);
  for (const [output, name] of OUTPUTS.entries()) {
    const input = node.inputs.findIndex((/** @type {any} */ one) => one.name === name);
    if (input >= 0) made.connect(output, node, input);
  }
  return made;
}
