// @ts-check
/** What we say, in the language of the frontend: `locales/<language>/main.json`, which the host serves. */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const FALLBACK = "en";

/** @type {Promise<Record<string, any>> | undefined} */
let loading;
/** @type {Record<string, any>} */
let table = {};

/** Resolves when `say` can be used. */
export async function wordsLoaded() {
  loading ??= api
    .fetchApi("/i18n")
    .then((reply) => reply.json())
    .catch(() => ({}));
  table = await loading;
}

/**
 * @param {string} key such as "card.copy"
 * @param {Record<string, string | number>} [values] for `{name}` in the text
 * @returns {string}
 */
export function say(key, values = {}) {
  const text = find(language(), key) ?? find(FALLBACK, key) ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** @returns {string} such as "en" or "zh-TW" */
export function language() {
  return String(app.extensionManager?.setting?.get("Comfy.Locale") ?? FALLBACK);
}

/**
 * @param {string} locale
 * @param {string} key
 * @returns {string | undefined}
 */
function find(locale, key) {
  const parts = ["saInject", ...key.split(".")];
  const text = parts.reduce((/** @type {any} */ inside, part) => inside?.[part], table[locale]);
  return typeof text === "string" ? text : undefined;
}
