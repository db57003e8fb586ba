// @ts-check
/** One training as the browser knows it: what the server told at once, and what it has told since, step by step. */

const MOST_POINTS = 500;
const ACTIVE = new Set(["reading", "encoding", "training", "sampling", "validating", "saving"]);

/** @typedef {import("./runs.mjs").Run} Run */
/**
 * @typedef {object} Event what comes over the socket
 * @property {string} run
 * @property {number} updated_at
 * @property {string} phase
 * @property {string} text
 * @property {number} step
 * @property {number} steps
 * @property {number | null} resumed_at
 * @property {number | null} loss
 * @property {number | null} smoothed
 * @property {number | null} validation
 * @property {number} seconds
 * @property {number | null} left
 * @property {number | null} memory
 * @property {number | null} sample
 * @property {number} warnings how many there are
 * @property {number} [facts] how many there are
 */

export class RunState {
  /** @type {Run | null} */
  data = null;
  /** @type {() => void} */
  #changed;

  /** @param {() => void} changed called after every change */
  constructor(changed) {
    this.#changed = changed;
  }

  get isActive() {
    return this.data !== null && ACTIVE.has(this.data.phase);
  }

  /**
   * Everything, from the route or from a node's result, and what was heard while it was under way.
   * @param {Run} run
   * @param {Event[]} [heard]
   * @returns {boolean} as `follow`
   */
  take(run, heard = []) {
    this.data = { ...run, points: [...(run.points ?? [])], samples: [...(run.samples ?? [])], resumed_at: [...(run.resumed_at ?? [])] };
    const isIncomplete = heard.map((event) => this.#add(event)).includes(true);
    this.#changed();
    return isIncomplete;
  }

  forget() {
    this.data = null;
    this.#changed();
  }

  /**
   * What has just happened.
   * @param {Event} event
   * @returns {boolean} whether the rest has to be fetched: the event tells that there is more than it holds
   */
  follow(event) {
    const isIncomplete = this.#add(event);
    this.#changed();
    return isIncomplete;
  }

  /** @param {Event} event */
  #add(event) {
    const known = this.data?.run === event.run ? this.data : null;
    if (known && event.updated_at < known.updated_at) return false; // what is known already counts it
    const run = known ?? { ...EMPTY, run: event.run };
    if (!known || event.phase === "reading") Object.assign(run, { points: [], samples: [], resumed_at: [], warnings: [], facts: [] });
    if (event.step < run.step) run.points = run.points.filter(([step]) => step <= event.step);
    Object.assign(run, {
      updated_at: event.updated_at, phase: event.phase, text: event.text, step: event.step, steps: event.steps,
      seconds: event.seconds, left: event.left, memory: event.memory,
    });
    if (event.resumed_at !== null && !run.resumed_at.includes(event.resumed_at)) run.resumed_at.push(event.resumed_at);
    addPoint(run, event);
    this.data = run;
    const hasAllTexts = event.warnings === (run.warnings ?? []).length && (event.facts ?? 0) === (run.facts ?? []).length;
    return !known || event.sample !== null || event.resumed_at !== null || !hasAllTexts;
  }
}

/** @type {Run} */
const EMPTY = {
  run: "", updated_at: 0, phase: "reading", text: "", step: 0, steps: 0, resumed_at: [], seconds: 0, left: null, memory: null,
  points: [], samples: [],
};

/**
 * @param {Run} run
 * @param {Event} event
 */
function addPoint(run, event) {
  const last = run.points.at(-1);
  if (event.loss === null && event.validation === null) return;
  if (last && last[0] === event.step) {
    run.points[run.points.length - 1] = [event.step, event.loss ?? last[1], event.smoothed ?? last[2], event.validation ?? last[3]];
  } else if (!last || last[0] < event.step) {
    run.points.push([event.step, event.loss, event.smoothed, event.validation]);
  }
  if (run.points.length > MOST_POINTS) run.points = thinned(run.points);
}

/**
 * Every second point, and every one with a validation.
 * @param {import("./runs.mjs").Point[]} points
 */
const thinned = (points) => points.filter((point, place) => place % 2 === 0 || point[3] !== null || place === points.length - 1);
