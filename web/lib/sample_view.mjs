// @ts-check
/** Sample pictures of a run: the newest large, all of them in a strip by step, a row for each prompt. */
import { arrange, element } from "./dom.mjs";
import { sampleAddress } from "./runs.mjs";
import { say } from "./words.mjs";

const THUMBNAIL = 96; // pixels asked for; a screen may have two for each of ours
const LARGE = 512;

/** @typedef {import("./runs.mjs").Run} Run */
/** @typedef {import("./runs.mjs").Sample} Sample */
/** @typedef {{key: string, sample: Sample, row: number, index: number, prompt: string}} Shot */

/** @param {HTMLElement} container */
export function mountSampleView(container) {
  const large = element("div", { class: "large" });
  const strip = element("div", { class: "strip", data: { held: "", scrolls: "" } });
  container.replaceChildren(large, strip);

  /** @type {Run | null} */
  let run = null;
  let drawn = "";
  /** @type {Shot[]} */
  let shots = [];
  /** @type {string | null} the key of the one that the pointer or the keyboard is at */
  let looked = null;
  // Elements by their shot: what is shown again is the same element, with its picture and the keyboard's focus.
  const figures = keeping(figure);
  const tiles = keeping(tile);
  /** @type {HTMLElement[]} */
  const rows = [];

  strip.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => event.buttons && look(keyAt(event.target)));
  strip.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => look(keyAt(event.target)));
  strip.addEventListener("focusin", (/** @type {FocusEvent} */ event) => look(keyAt(event.target)));
  strip.addEventListener("focusout", () => look(null));
  strip.addEventListener("pointerleave", () => look(null));
  strip.addEventListener("pointerup", () => look(null));

  /** @param {string | null} key */
  function look(key) {
    looked = key;
    drawLarge();
  }

  /** @param {EventTarget | null} target @returns {string | null} */
  function keyAt(target) {
    const tile = target instanceof Element ? target.closest("[data-shot]") : null;
    return tile ? (/** @type {HTMLElement} */ (tile).dataset.shot ?? null) : null;
  }

  function drawLarge() {
    const at = shots.find(({ key }) => key === looked) ?? null;
    const newest = shots.filter((shot) => shot.row === (at?.row ?? 0)).at(-1) ?? null;
    const pair = at && newest && at !== newest ? [at, newest] : [newest];
    arrange(large, figures(pair.filter((shot) => shot !== null)));
    large.hidden = !newest;
  }

  /** @param {Shot} shot */
  function figure(shot) {
    const name = say("sample.at", { step: shot.sample.step });
    return element(
      "a",
      { href: address(shot), target: "_blank", rel: "noopener", title: `${name}. ${shot.prompt}`, draggable: false },
      element("img", { src: address(shot, LARGE), alt: `${name}: ${shot.prompt}`, draggable: false }),
      element("span", { class: "caption" }, name),
    );
  }

  /** @param {Shot} shot @param {number} [size] */
  const address = (shot, size) => sampleAddress(run?.run ?? "", shot.sample, shot.index, size);

  function drawStrip() {
    const count = shots.length ? 1 + Math.max(...shots.map((shot) => shot.row)) : 0;
    while (rows.length < count) rows.push(element("div", { class: "prompt-row", role: "group" }));
    strip.hidden = shots.length < 2;
    strip.classList.toggle("several", count > 1);
    arrange(strip, rows.slice(0, count));
    const all = tiles(shots);
    rows.forEach((row, place) => {
      row.setAttribute("aria-label", shots.find((shot) => shot.row === place)?.prompt ?? "");
      arrange(row, all.filter((_, at) => shots[at].row === place));
    });
    if (!looked) strip.scrollLeft = strip.scrollWidth;
  }

  /** @param {Shot} shot */
  function tile(shot) {
    const { step } = shot.sample;
    const label = say("sample.at", { step });
    return element(
      "button",
      { type: "button", class: "shot", data: { shot: shot.key }, title: `${label}. ${shot.prompt}`, "aria-label": `${label}: ${shot.prompt}`, onclick: () => open(address(shot), "_blank", "noopener") },
      element("img", { src: address(shot, THUMBNAIL), alt: "", loading: "lazy", draggable: false }),
      element("span", {}, String(step)),
    );
  }

  return {
    /** @param {Run | null} shown */
    show(shown) {
      run = shown;
      const wanted = JSON.stringify([shown?.run, shown?.samples]);
      if (wanted === drawn) return;
      drawn = wanted;
      shots = shown ? shotsOf(shown) : [];
      drawLarge();
      drawStrip();
    },
    destroy: () => container.replaceChildren(),
  };
}

/** @param {Run} run @returns {Shot[]} */
function shotsOf(run) {
  return run.samples.flatMap((sample) =>
    sample.images.map((index, row) => {
      const prompt = sample.prompts[row] ?? "";
      return { key: JSON.stringify([run.run, sample.step, sample.drawn_at, index, prompt]), sample, row, index, prompt };
    }),
  );
}

/**
 * Elements that are made once for each shot, and forgotten when it is no longer asked for.
 * @param {(shot: Shot) => HTMLElement} make
 */
function keeping(make) {
  /** @type {Map<string, HTMLElement>} */
  let known = new Map();
  return (/** @type {Shot[]} */ shots) => {
    known = new Map(shots.map((shot) => [shot.key, known.get(shot.key) ?? make(shot)]));
    return [...known.values()];
  };
}
