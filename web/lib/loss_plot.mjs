// @ts-check
/** The loss, drawn by hand on one canvas: raw faint, smoothed and validation as lines, marks where something happened. */
import { element } from "./dom.mjs";
import { say } from "./words.mjs";

const MARGIN = { left: 58, right: 10, top: 8, bottom: 30 };
const CLIP = 0.02; // at both ends: one early peak would flatten everything else
const TICKS = 4;

/** @typedef {import("./runs.mjs").Run} Run */
/** @typedef {import("./runs.mjs").Point} Point */

/** @param {HTMLElement} container */
export function mountLossPlot(container) {
  const canvas = element("canvas", { tabIndex: 0, role: "img" });
  const told = element("output", { class: "told faint" });
  const legend = element("div", { class: "legend faint" }, ...["raw", "smoothed", "validation"].map(entry));
  container.replaceChildren(element("div", { class: "plot-head" }, legend, told), canvas);

  /** @type {Run | null} */
  let run = null;
  /** @type {number | null} the step under the pointer, or chosen with the arrow keys */
  let pointed = null;

  const observer = new ResizeObserver(() => draw());
  observer.observe(canvas);
  canvas.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => point(stepAt(event)));
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("blur", () => point(null));
  canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !run?.points.length) return;
    event.preventDefault();
    event.stopPropagation();
    const at = run.points.findIndex(([step]) => step === pointed);
    const to = at < 0 ? run.points.length - 1 : Math.min(Math.max(at + move, 0), run.points.length - 1);
    point(run.points[to][0]);
  });

  /** @param {number | null} step */
  function point(step) {
    pointed = step;
    const found = step === null ? null : nearest(run?.points ?? [], step);
    told.textContent = found ? readOut(found) : "";
    draw();
  }

  /** @param {PointerEvent} event */
  function stepAt(event) {
    if (!run?.points.length) return null;
    const box = canvas.getBoundingClientRect();
    const share = ((event.clientX - box.left) * (canvas.clientWidth / box.width) - MARGIN.left) / (canvas.clientWidth - MARGIN.left - MARGIN.right);
    return Math.round(share * lastStep(run));
  }

  function draw() {
    const wide = canvas.clientWidth;
    const tall = canvas.clientHeight;
    if (!wide || !tall) return;
    const zoom = Math.max(1, canvas.getBoundingClientRect().width / wide) * (globalThis.devicePixelRatio || 1);
    canvas.width = Math.round(wide * zoom);
    canvas.height = Math.round(tall * zoom);
    const context = canvas.getContext("2d");
    if (!context) return;
    context.scale(zoom, zoom);
    context.clearRect(0, 0, wide, tall);
    if (run?.points.length) drawRun(context, run, pointed, wide, tall, colours(canvas));
  }

  return {
    /** @param {Run | null} shown */
    show(shown) {
      run = shown;
      legend.children[2].hidden = !shown?.points.some((point) => point[3] !== null);
      const last = shown?.points.at(-1);
      canvas.setAttribute("aria-label", last ? `${say("plot.title")}. ${readOut(last)}` : say("plot.title"));
      draw();
    },
    destroy: () => observer.disconnect(),
  };
}

/** @param {string} name */
const entry = (name) => element("span", { class: `key ${name}` }, say(`plot.${name}`));

/** @param {HTMLElement} canvas */
function colours(canvas) {
  const style = getComputedStyle(canvas);
  const of = (/** @type {string} */ name) => style.getPropertyValue(name).trim() || style.color;
  return { ink: of("--ink"), faint: of("--faint"), line: of("--line"), smoothed: of("--smoothed"), validation: of("--validation") };
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Run} run
 * @param {number | null} pointed
 * @param {number} wide
 * @param {number} tall
 * @param {ReturnType<typeof colours>} colour
 */
function drawRun(context, run, pointed, wide, tall, colour) {
  const [low, high] = range(run.points);
  const end = lastStep(run);
  const right = wide - MARGIN.right;
  const bottom = tall - MARGIN.bottom;
  const x = (/** @type {number} */ step) => MARGIN.left + (step / end) * (right - MARGIN.left);
  const y = (/** @type {number} */ loss) => bottom - ((loss - low) / (high - low)) * (bottom - MARGIN.top);

  context.font = "10px Inter, Arial, sans-serif";
  context.lineWidth = 1;
  context.textBaseline = "middle";
  for (let tick = 0; tick <= TICKS; tick++) {
    const loss = low + ((high - low) * tick) / TICKS;
    const step = Math.round((end * tick) / TICKS);
    context.fillStyle = colour.faint;
    context.textAlign = "right";
    context.fillText(shortNumber(loss), MARGIN.left - 5, y(loss));
    context.textAlign = tick === TICKS ? "right" : tick ? "center" : "left";
    context.fillText(String(step), x(step), bottom + 9);
    stroke(context, colour.line, 0.5, [[MARGIN.left, y(loss)], [right, y(loss)]]);
  }
  context.textAlign = "center";
  context.fillText(say("plot.step"), (MARGIN.left + right) / 2, tall - 6);
  context.save();
  context.translate(7, (MARGIN.top + bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.fillText(say("plot.loss"), 0, 0);
  context.restore();

  context.save();
  context.beginPath();
  context.rect(MARGIN.left, MARGIN.top - 2, right - MARGIN.left, bottom - MARGIN.top + 4);
  context.clip();
  const path = (/** @type {1 | 2 | 3} */ which) =>
    /** @type {[number, number][]} */ (run.points.filter((point) => point[which] !== null).map((point) => [x(point[0]), y(Number(point[which]))]));
  for (const step of run.resumed_at) {
    context.setLineDash([4, 3]);
    stroke(context, colour.ink, 0.6, [[x(step), MARGIN.top], [x(step), bottom]]);
    context.setLineDash([]);
  }
  stroke(context, colour.ink, 0.3, path(1));
  context.lineWidth = 2;
  stroke(context, colour.smoothed, 1, path(2));
  stroke(context, colour.validation, 1, path(3));
  for (const [px, py] of path(3)) dot(context, colour.validation, px, py, 2.5);
  for (const { step } of run.samples) triangle(context, colour.ink, x(step), bottom);
  const found = pointed === null ? null : nearest(run.points, pointed);
  if (found) {
    context.lineWidth = 1;
    stroke(context, colour.ink, 0.8, [[x(found[0]), MARGIN.top], [x(found[0]), bottom]]);
    if (found[2] !== null) dot(context, colour.smoothed, x(found[0]), y(found[2]), 3.5);
  }
  context.restore();
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {string} colour
 * @param {number} alpha
 * @param {[number, number][]} path
 */
function stroke(context, colour, alpha, path) {
  context.globalAlpha = alpha;
  context.strokeStyle = colour;
  context.beginPath();
  for (const [x, y] of path) context.lineTo(x, y);
  context.stroke();
  context.globalAlpha = 1;
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {string} colour
 * @param {number} x
 * @param {number} y
 * @param {number} radius
 */
function dot(context, colour, x, y, radius) {
  context.fillStyle = colour;
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.fill();
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {string} colour
 * @param {number} x
 * @param {number} bottom
 */
function triangle(context, colour, x, bottom) {
  context.fillStyle = colour;
  context.beginPath();
  context.moveTo(x - 4, bottom + 1);
  context.lineTo(x + 4, bottom + 1);
  context.lineTo(x, bottom - 6);
  context.fill();
}

/** @param {Run} run */
const lastStep = (run) => Math.max(run.steps, run.points.at(-1)?.[0] ?? 0, 1);

/**
 * From the second to the ninety-eighth of a hundred.
 * @param {Point[]} points
 * @returns {[number, number]}
 */
export function range(points) {
  const all = points.flatMap((point) => point.slice(1)).filter((loss) => loss !== null && Number.isFinite(loss));
  const losses = /** @type {number[]} */ (all).sort((one, other) => one - other);
  if (!losses.length) return [0, 1];
  const at = (/** @type {number} */ share) => losses[Math.round(share * (losses.length - 1))];
  const [low, high] = [at(CLIP), at(1 - CLIP)];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.1; // equal losses still have a line
  return [low < 0 ? low - room : Math.max(low - room, 0), high + room];
}

/**
 * @param {Point[]} points
 * @param {number} step
 * @returns {Point | null}
 */
function nearest(points, step) {
  let best = null;
  for (const point of points) if (!best || Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
  return best;
}

/** @param {Point} point */
function readOut([step, loss, smoothed, validation]) {
  const parts = [`${say("plot.step")} ${step}`];
  if (loss !== null) parts.push(`${say("plot.raw")} ${shortNumber(loss)}`);
  if (smoothed !== null) parts.push(`${say("plot.smoothed")} ${shortNumber(smoothed)}`);
  if (validation !== null) parts.push(`${say("plot.validation")} ${shortNumber(validation)}`);
  return parts.join(" · ");
}

/** @param {number} value */
const shortNumber = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3));
