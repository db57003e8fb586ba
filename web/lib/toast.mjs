// @ts-check
/** A short message in a corner, by whichever of the two ways the frontend knows. */
import { app } from "../../../scripts/app.js";

const SHOWN_FOR = 8000; // milliseconds

/**
 * @param {"success" | "info" | "warn" | "error"} severity
 * @param {string} detail
 */
export function tell(severity, detail) {
  const toast = /** @type {any} */ (app.extensionManager)?.toast;
  const named = severity === "warn" ? "warning" : severity;
  if (typeof toast?.[named] === "function") toast[named]("SA-Inject", { description: detail, duration: SHOWN_FOR });
  else toast?.add({ severity, summary: "SA-Inject", detail, life: SHOWN_FOR });
}
