// @ts-check
/** The panel of one training: where it is, what it draws, how its loss falls. It knows nothing of the canvas it lies on. */
import { duration, gigabytes } from "./amounts.mjs";
import { element, setText } from "./dom.mjs";
import { mountLossPlot } from "./loss_plot.mjs";
import { mountSampleView } from "./sample_view.mjs";
import { say } from "./words.mjs";

/** @typedef {import("./runs.mjs").Run} Run */

/**
 * @param {HTMLElement} container
 * @param {{finish: () => void, sample: () => void}} actions
 */
export function mountTrainingView(container, actions) {
  container.classList.add("sa-inject-panel");
  container.setAttribute("role", "group");
  container.setAttribute("aria-label", say("panel.title"));
  const phase = element("strong", { "aria-live": "polite" });
  const step = element("span", { class: "steps" });
  const finish = button("panel.finish", "panel.finishHelp", actions.finish);
  const sample = button("panel.sample", "panel.sampleHelp", actions.sample);
  const bar = element("progress", { max: 1, value: 0, "aria-label": say("panel.progress") });
  const facts = element("div", { class: "facts faint" });
  const said = element("p", { class: "said" });
  const given = element("p", { class: "given faint" });
  const warnings = element("ul", { class: "warnings" });
  const pictures = element("div", { class: "samples" });
  const plot = element("div", { class: "plot" });
  container.replaceChildren(
    element("div", { class: "head" }, phase, step, element("span", { class: "buttons" }, sample, finish)),
    bar, facts, said, given, warnings, pictures, plot,
  );
  const sampleView = mountSampleView(pictures);
  const lossPlot = mountLossPlot(plot);

  /**
   * @param {Run | null} run
   * @param {boolean} isActive
   */
  function show(run, isActive) {
    container.classList.toggle("empty", !run);
    setText(phase, run ? say(`phase.${run.phase}`) : say("panel.title"));
    setText(step, run?.steps ? say("panel.steps", { step: run.step, steps: run.steps }) : "");
    bar.value = run?.steps ? run.step / run.steps : 0;
    for (const one of [finish, sample]) one.setAttribute("aria-disabled", String(!isActive));
    const isTold = run && !["training", "validating", "sampling", "reading", "encoding"].includes(run.phase);
    setText(said, run ? (isTold ? run.text : "") : say("panel.empty"));
    said.classList.toggle("trouble", run?.phase === "error");
    said.hidden = !said.textContent;
    facts.replaceChildren(...(run ? factsOf(run, isActive) : []).map((fact) => element("span", {}, fact)));
    setText(given, (run?.facts ?? []).join(" "));
    given.hidden = !given.textContent;
    warnings.replaceChildren(...(run?.warnings ?? []).map((warning) => element("li", {}, warning)));
    warnings.hidden = !run?.warnings?.length;
    sampleView.show(run);
    lossPlot.show(run);
  }

  return {
    show,
    destroy() {
      sampleView.destroy();
      lossPlot.destroy();
      container.replaceChildren();
    },
  };
}

/**
 * Not `disabled` while it has no use: that takes the keyboard's focus away from it, and does not give it back.
 * @param {string} key
 * @param {string} help
 * @param {() => void} pressed
 */
function button(key, help, pressed) {
  const made = element("button", { type: "button", title: say(help), "aria-disabled": "true" }, say(key));
  made.addEventListener("click", () => made.getAttribute("aria-disabled") === "false" && pressed());
  return made;
}

/**
 * @param {Run} run
 * @param {boolean} isActive
 * @returns {string[]}
 */
function factsOf(run, isActive) {
  const resumed = run.resumed_at.at(-1);
  const taken = run.step - (resumed ?? 0);
  const facts = [say("panel.elapsed", { time: duration(run.seconds) })];
  if (isActive && run.left !== null) facts.push(say("panel.left", { time: duration(run.left) }));
  if (taken > 0 && run.seconds > 0) facts.push(say("panel.speed", { speed: (taken / run.seconds).toPrecision(2) }));
  if (run.memory) facts.push(gigabytes(run.memory));
  if (resumed) facts.push(say("panel.resumed", { step: resumed }));
  if (run.placeholder_token) facts.push([run.placeholder_token, run.class_word].filter(Boolean).join(" "));
  return facts;
}
