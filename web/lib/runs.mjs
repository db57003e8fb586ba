// @ts-check
/** What the server knows of trainings, and the two things that it can be asked to do. */
import { api } from "../../../scripts/api.js";

/**
 * @typedef {[number, number | null, number | null, number | null]} Point step, loss, smoothed, validation
 * @typedef {{step: number, prompts: string[], images: number[], drawn_at?: number}} Sample
 * @typedef {object} Run
 * @property {string} run
 * @property {number} updated_at when this was so, in seconds
 * @property {string} phase
 * @property {string} text
 * @property {number} step
 * @property {number} steps
 * @property {number[]} resumed_at
 * @property {number} seconds
 * @property {number | null} left
 * @property {number | null} memory
 * @property {string} [placeholder_token]
 * @property {string} [class_word]
 * @property {Point[]} points
 * @property {Sample[]} samples
 * @property {number[]} [kept]
 * @property {string[]} [warnings]
 * @property {string[]} [facts] known before the first step
 */

/** @param {string} run */
const path = (run) => `/sa_inject/runs/${encodeURIComponent(run)}`;

/**
 * @param {string} run
 * @returns {Promise<Run | null>} null where there is none of that name
 */
export async function fetchRun(run) {
  try {
    const reply = await api.fetchApi(path(run));
    return reply.ok ? await reply.json() : null;
  } catch {
    return null; // the server is away; it is asked again when it is back
  }
}

/**
 * @param {string} run
 * @param {"finish" | "sample"} wish
 * @returns {Promise<string | null>} why not
 */
export async function ask(run, wish) {
  try {
    const reply = await api.fetchApi(`${path(run)}/${wish}`, { method: "POST" });
    return reply.ok ? null : ((await reply.json()).error ?? String(reply.status));
  } catch (error) {
    return String(error);
  }
}

/**
 * @param {string} run
 * @param {Sample} sample
 * @param {number} index
 * @param {number} [size] pixels; the whole picture without
 */
export function sampleAddress(run, { step, drawn_at }, index, size) {
  const asked = new URLSearchParams();
  if (size) asked.set("size", String(size));
  if (drawn_at) asked.set("drawn", String(drawn_at)); // an earlier training of this name has left other pictures in the browser
  return api.apiURL(`${path(run)}/samples/${step}/${index}?${asked}`);
}
