// @ts-check
/** The card of one adapter: its face, the word to write, and what it was made for. */
import { element, setText } from "./dom.mjs";
import { say } from "./words.mjs";
import { thumbnailAddress } from "./adapters.mjs";

const COPIED_FOR = 1500; // milliseconds

/** @typedef {import("./adapters.mjs").Card} Card */

/**
 * The elements are made once, and stay: what is in use must not lose the keyboard's focus, nor its list close.
 * @param {HTMLElement} container
 * @param {{choose: () => void, take: (name: string) => void}} actions
 */
export function mountAdapterCard(container, actions) {
  container.classList.add("sa-inject-card");
  const label = say("card.choose");
  const face = element("button", { class: "face", type: "button", title: label, "aria-label": label, onclick: actions.choose });
  const word = element("button", { class: "word", type: "button", title: say("card.copy"), onclick: copyWord });
  const classWord = element("span", { title: say("card.classWord") });
  const naming = element("div", { class: "row" }, word, classWord);
  const details = element("div", { class: "row faint" });
  const kept = element("select", {
    "aria-label": say("card.kept"), title: say("card.kept"),
    onchange: (/** @type {any} */ event) => actions.take(event.target.value),
  });
  const chooser = element("button", { class: "plain", type: "button", onclick: actions.choose }, label);
  const none = element("p", { class: "faint" }, say("card.none"));
  const trouble = element("p", { class: "trouble", role: "alert" });
  container.replaceChildren(face, element("div", { class: "facts" }, none, naming, details, element("div", { class: "row" }, kept, chooser), trouble));

  /** @type {Card | null} */
  let shown = null;
  let drawn = "";

  /**
   * @param {Card | null} card
   * @param {string | null} [misfit] why the connected model is another
   */
  function show(card, misfit = null) {
    const wanted = JSON.stringify([card, misfit]);
    if (wanted === drawn) return; // the graph changes often, and most changes are none of ours
    drawn = wanted;
    shown = card && !card.error ? card : null;
    none.hidden = Boolean(card);
    face.replaceChildren(pictureOf(shown));
    naming.hidden = details.hidden = !shown;
    setText(word, shown?.placeholder_token ?? "");
    setText(classWord, shown?.class_word ?? "");
    details.replaceChildren(...(shown ? facts(shown) : []).map((fact) => element("span", {}, fact)));
    kept.hidden = !shown?.kept?.length;
    kept.replaceChildren(...(shown ? optionsOf(shown) : []));
    setText(trouble, card?.error ? say("card.unusable", { why: card.error }) : (misfit ?? ""));
    trouble.hidden = !trouble.textContent;
  }

  async function copyWord() {
    const text = shown?.placeholder_token ?? "";
    await copy(text);
    setText(word, say("card.copied"));
    setTimeout(() => setText(word, shown?.placeholder_token ?? ""), COPIED_FOR);
  }

  return { show, destroy: () => container.replaceChildren() };
}

/** @param {Card | null} card */
function pictureOf(card) {
  if (!card?.thumbnail) return element("i", { class: "pi pi-image", "aria-hidden": "true" });
  return element("img", { src: thumbnailAddress(card), alt: say("card.face", { name: card.name }), draggable: false });
}

/** @param {Card} card */
function optionsOf(card) {
  const last = element("option", { value: card.name, selected: true }, say("card.last"));
  return [last, ...(card.kept ?? []).map(({ step, name }) => element("option", { value: name }, say("card.step", { step })))];
}

/** @param {Card} card */
function facts(card) {
  const parts = [
    card.architecture,
    card.steps && say("card.steps", { steps: card.steps }),
    card.resolution && say("card.resolution", { resolution: card.resolution }),
    card.reference_mode,
    card.date,
  ];
  return parts.filter(Boolean).map(String);
}

/** @param {string} text */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page without https has no clipboard of that kind.
    const area = element("textarea", { value: text, class: "sa-inject-offscreen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
