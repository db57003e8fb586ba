// @ts-check
/** The card of one adapter: its face, the word to write, and what it was made for. */
import { element } from "./dom.mjs";
import { say } from "./words.mjs";
import { thumbnailAddress } from "./adapters.mjs";

const COPIED_FOR = 1500; // milliseconds

/**
 * @param {HTMLElement} container
 * @param {{choose: () => void, take: (name: string) => void}} actions
 */
export function mountAdapterCard(container, actions) {
  container.classList.add("sa-inject-card");

  /**
   * @param {import("./adapters.mjs").Card | null} card
   * @param {string | null} [misfit] why the connected model is another
   */
  function show(card, misfit = null) {
    container.replaceChildren(...(card ? filled(card, misfit) : empty()));
  }

  function empty() {
    return [face(null), element("div", { class: "facts" }, element("p", { class: "faint" }, say("card.none")), chooser())];
  }

  /**
   * @param {import("./adapters.mjs").Card} card
   * @param {string | null} misfit
   */
  function filled(card, misfit) {
    if (card.error) {
      const why = say("card.unusable", { why: card.error });
      return [face(null), element("div", { class: "facts" }, element("p", { class: "trouble", role: "alert" }, why), chooser())];
    }
    return [
      face(card),
      element(
        "div",
        { class: "facts" },
        element("div", { class: "row" }, word(card), card.class_word && element("span", { title: say("card.classWord") }, card.class_word)),
        element("div", { class: "row faint" }, ...facts(card).map((fact) => element("span", {}, fact))),
        element("div", { class: "row" }, kept(card), chooser()),
        misfit && element("p", { class: "trouble", role: "alert" }, misfit),
      ),
    ];
  }

  /** @param {import("./adapters.mjs").Card | null} card */
  function face(card) {
    const label = say("card.choose");
    const picture = card?.thumbnail
      ? element("img", { src: thumbnailAddress(card), alt: say("card.face", { name: card.name }), draggable: false })
      : element("i", { class: "pi pi-image", "aria-hidden": "true" });
    return element("button", { class: "face", type: "button", title: label, "aria-label": label, onclick: actions.choose }, picture);
  }

  /** @param {import("./adapters.mjs").Card} card */
  function word(card) {
    const text = card.placeholder_token ?? "";
    const button = element("button", { class: "word", type: "button", title: say("card.copy") }, text);
    button.addEventListener("click", async () => {
      await copy(text);
      button.textContent = say("card.copied");
      setTimeout(() => (button.textContent = text), COPIED_FOR);
    });
    return button;
  }

  /** @param {import("./adapters.mjs").Card} card */
  function kept(card) {
    if (!card.kept?.length) return null;
    const options = card.kept.map(({ step, name }) => element("option", { value: name }, say("card.step", { step })));
    const last = element("option", { value: card.name, selected: true }, say("card.last"));
    return element(
      "select",
      { "aria-label": say("card.kept"), title: say("card.kept"), onchange: (/** @type {any} */ event) => actions.take(event.target.value) },
      last,
      ...options,
    );
  }

  function chooser() {
    return element("button", { class: "plain", type: "button", onclick: actions.choose }, say("card.choose"));
  }

  return { show, destroy: () => container.replaceChildren() };
}

/** @param {import("./adapters.mjs").Card} card */
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
