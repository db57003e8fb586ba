// @ts-check
/** Sample pictures of a run: the newest large, all of them in a strip by step, a row for each prompt. */
import { element } from "./dom.mjs";
import { sampleAddress } from "./runs.mjs";
import { say } from "./words.mjs";

const THUMBNAIL = 96; // pixels asked for; a screen may have two for each of ours
const LARGE = 512;

/** @typedef {import("./runs.mjs").Run} Run */
/** @typedef {{step: number, row: number, index: number, prompt: string}} Shot */

/** @param {HTMLElement} container */
export function mountSampleView(container) {
  const large = element("div", { class: "large" });
  const strip = element("div", { class: "strip", data: { held: "", scrolls: "" } });
  container.replaceChildren(large, strip);

  /** @type {Run | null} */
  let run = null;
  let drawn = "";
  /** @type {Shot | null} the one that the pointer or the keyboard is at */
  let looked = null;

  strip.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => event.buttons && look(shotAt(event.target)));
  strip.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => look(shotAt(event.target)));
  strip.addEventListener("focusin", (/** @type {FocusEvent} */ event) => look(shotAt(event.target)));
  strip.addEventListener("focusout", () => look(null));
  strip.addEventListener("pointerleave", () => look(null));
  strip.addEventListener("pointerup", () => look(null));

  /** @param {Shot | null} shot */
  function look(shot) {
    looked = shot;
    drawLarge();
  }

  /** @returns {Shot[]} */
  function shots() {
    return (run?.samples ?? []).flatMap(({ step, prompts, images }) =>
      images.map((index, row) => ({ step, row, index, prompt: prompts[row] ?? "" })),
    );
  }

  /** @param {EventTarget | null} target @returns {Shot | null} */
  function shotAt(target) {
    const tile = target instanceof Element ? target.closest("[data-shot]") : null;
    return tile ? (shots()[Number(/** @type {HTMLElement} */ (tile).dataset.shot)] ?? null) : null;
  }

  function drawLarge() {
    const all = shots();
    const newest = all.filter((shot) => shot.row === (looked?.row ?? 0)).at(-1) ?? null;
    const pair = looked && newest && looked.step !== newest.step ? [looked, newest] : [newest];
    large.replaceChildren(...pair.filter((shot) => shot !== null).map((shot) => figure(/** @type {Shot} */ (shot))));
    large.hidden = !newest;
  }

  /** @param {Shot} shot */
  function figure(shot) {
    const name = say("sample.at", { step: shot.step });
    return element(
      "a",
      { href: address(shot), target: "_blank", rel: "noopener", title: `${name}. ${shot.prompt}`, draggable: false },
      element("img", { src: address(shot, LARGE), alt: `${name}: ${shot.prompt}`, draggable: false }),
      element("span", { class: "caption" }, name),
    );
  }

  /** @param {Shot} shot @param {number} [size] */
  const address = (shot, size) => sampleAddress(run?.run ?? "", shot.step, shot.index, size);

  function drawStrip() {
    const all = shots();
    const rows = 1 + Math.max(-1, ...all.map((shot) => shot.row));
    strip.hidden = all.length < 2;
    strip.classList.toggle("several", rows > 1);
    strip.replaceChildren(
      ...Array.from({ length: rows }, (_, row) =>
        element(
          "div",
          { class: "prompt-row", role: "group", "aria-label": all.find((shot) => shot.row === row)?.prompt ?? "" },
          ...all.map((shot, place) => (shot.row === row ? tile(shot, place) : null)),
        ),
      ),
    );
    strip.scrollLeft = strip.scrollWidth;
  }

  /** @param {Shot} shot @param {number} place */
  function tile(shot, place) {
    const label = say("sample.at", { step: shot.step });
    return element(
      "button",
      { type: "button", class: "shot", data: { shot: place }, title: `${label}. ${shot.prompt}`, "aria-label": `${label}: ${shot.prompt}`, onclick: () => open(address(shot), "_blank", "noopener") },
      element("img", { src: address(shot, THUMBNAIL), alt: "", loading: "lazy", draggable: false }),
      element("span", {}, String(shot.step)),
    );
  }

  return {
    /** @param {Run | null} shown */
    show(shown) {
      run = shown;
      const wanted = JSON.stringify([shown?.run, shown?.samples]);
      if (wanted === drawn) return; // pictures flicker when they are made again
      drawn = wanted;
      looked = null;
      drawLarge();
      drawStrip();
    },
    destroy: () => container.replaceChildren(),
  };
}
