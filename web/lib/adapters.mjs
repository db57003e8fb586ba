// @ts-check
/** What the server knows of the adapters in models/sa_inject. */
import { api } from "../../../scripts/api.js";

/**
 * @typedef {object} Card
 * @property {string} name as the host lists it
 * @property {string} version changes with the file
 * @property {number} bytes
 * @property {string} [error] why the file is of no use
 * @property {string} [placeholder_token]
 * @property {string} [class_word]
 * @property {string} [architecture]
 * @property {string} [reference_mode]
 * @property {number | null} [steps]
 * @property {number | null} [resolution]
 * @property {string} [date]
 * @property {boolean} [thumbnail]
 * @property {{step: number, name: string}[]} [kept]
 */

/**
 * @param {string} path
 * @returns {Promise<any>} null where the server does not know it
 */
async function get(path) {
  try {
    const reply = await api.fetchApi(path);
    return reply.ok ? await reply.json() : null;
  } catch {
    return null; // the server is away; whoever asks again gets an answer later
  }
}

/** @returns {Promise<Card[]>} */
export const adapterCards = async () => (await get("/sa_inject/adapters"))?.adapters ?? [];

/**
 * @param {string} name
 * @returns {Promise<Card | null>}
 */
export const adapterCard = async (name) => (await get(`/sa_inject/adapters?${new URLSearchParams({ name })}`))?.adapters[0] ?? null;

/** @param {Card} card */
export const thumbnailAddress = (card) =>
  api.apiURL(`/sa_inject/adapters/${encodeURIComponent(card.name)}/thumbnail?v=${encodeURIComponent(card.version)}`);

/**
 * @param {{folder: string, name: string}} checkpoint
 * @returns {Promise<string | null>} such as "SD1.x"
 */
export async function architectureOf({ folder, name }) {
  const asked = new URLSearchParams({ folder, name });
  return (await get(`/sa_inject/architecture?${asked}`))?.architecture ?? null;
}

/** A name without folder and ending, as people say it. @param {string} name */
export const shortName = (name) => (name.split(/[\\/]/).pop() ?? name).replace(/\.safetensors$/, "");
