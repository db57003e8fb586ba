// @ts-check
/** Making elements. Text is always text: nothing here, or anywhere else in this folder, parses markup. */

/**
 * @param {string} tag
 * @param {Record<string, unknown>} [properties] `class`, `data`, `aria-*` and `on*` are understood; the rest is set as it is
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {any}
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") made.className = String(value);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), /** @type {EventListener} */ (value));
    else if (name.startsWith("aria-") || name === "role") made.setAttribute(name, String(value));
    else Reflect.set(made, name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false).map(asNode));
  return made;
}

/** @param {unknown} child */
const asNode = (child) => (child instanceof Node ? child : document.createTextNode(String(child)));

/** A text that is not set again is not read aloud again. @param {HTMLElement} shown @param {string} text */
export function setText(shown, text) {
  if (shown.textContent !== text) shown.textContent = text;
}

/**
 * These children, in this order. Those that stay are not taken out, which would take the keyboard's focus from them.
 * @param {HTMLElement} parent
 * @param {Node[]} wanted
 */
export function arrange(parent, wanted) {
  for (const child of [...parent.childNodes]) if (!wanted.includes(child)) child.remove();
  wanted.forEach((child, place) => parent.childNodes[place] === child || parent.insertBefore(child, parent.childNodes[place] ?? null));
}

/** Our style sheet, once. */
export function loadStyles() {
  const href = new URL("../sa_inject.css", import.meta.url).href;
  if (document.querySelector(`link[href="${href}"]`)) return;
  document.head.append(element("link", { rel: "stylesheet", href }));
}
