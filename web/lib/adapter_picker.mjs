// @ts-check
/** All adapters as pictures, to choose one of. */
import { element } from "./dom.mjs";
import { say } from "./words.mjs";
import { adapterCards, shortName, thumbnailAddress } from "./adapters.mjs";

/** @returns {Promise<string | null>} the name of an adapter, or null */
export function pickAdapter() {
  return new Promise((resolve) => {
    const grid = element("div", { class: "grid", data: { scrolls: "" } });
    const count = element("span", { class: "faint", "aria-live": "polite" });
    const search = element("input", {
      type: "search", placeholder: say("picker.search"), "aria-label": say("picker.search"), autofocus: true,
      oninput: () => filter(), onkeydown: (/** @type {KeyboardEvent} */ event) => event.key === "Enter" && visible()[0]?.click(),
    });
    const close = element("button", { class: "plain", type: "button", onclick: () => dialog.close() }, say("picker.close"));
    const dialog = element(
      "dialog",
      {
        class: "sa-inject sa-inject-picker", "aria-label": say("picker.title"),
        onclose: () => finish(null), onclick: (/** @type {Event} */ event) => event.target === dialog && dialog.close(),
        // Keys that mean something to the canvas mean nothing here.
        onkeydown: (/** @type {Event} */ event) => event.stopPropagation(),
      },
      element("header", {}, element("strong", {}, say("picker.title")), search, count, close),
      grid,
    );

    /** @param {string | null} name */
    function finish(name) {
      dialog.remove();
      resolve(name);
    }

    /** @returns {HTMLElement[]} */
    const visible = () => [...grid.children].filter((tile) => !tile.hidden);

    function filter() {
      const wanted = search.value.trim().toLowerCase();
      for (const tile of grid.children) tile.hidden = !tile.dataset.text.includes(wanted);
      count.textContent = say("picker.count", { count: visible().length });
    }

    /** @param {import("./adapters.mjs").Card} card */
    function tile(card) {
      const picture = card.thumbnail
        ? element("img", { loading: "lazy", decoding: "async", width: 128, height: 128, alt: "", src: thumbnailAddress(card) })
        : element("i", { class: "pi pi-image", "aria-hidden": "true" });
      const about = card.error ?? [card.placeholder_token, card.class_word].filter(Boolean).join(" ");
      return element(
        "button",
        {
          type: "button", class: card.error ? "tile useless" : "tile", title: card.name, disabled: Boolean(card.error),
          data: { text: `${card.name} ${about} ${card.architecture ?? ""}`.toLowerCase() },
          onclick: () => finish(card.name),
        },
        element("span", { class: "picture" }, picture),
        element("span", { class: "name" }, shortName(card.name)),
        element("span", { class: "faint" }, [about, card.architecture].filter(Boolean).join(" · ")),
      );
    }

    document.body.append(dialog);
    dialog.showModal();
    adapterCards().then((cards) => {
      grid.append(...cards.filter((card) => !isKeptStep(card.name)).map(tile));
      if (!grid.children.length) grid.append(element("p", { class: "faint" }, say("picker.empty")));
      else filter();
    });
  });
}

/** An earlier step of a training is chosen on the card of its adapter. @param {string} name */
const isKeptStep = (name) => /\.training[\\/]/.test(name);
