// @ts-check
/** The dataset node and the training node take pictures that are dropped on them. */
import { app } from "../../scripts/app.js";
import { takeDroppedPictures } from "./lib/dropped_pictures.mjs";

app.registerExtension({
  name: "sa_inject.dropped_pictures",
  nodeCreated(/** @type {any} */ node) {
    if (["LoadSAInjectDataset", "TrainSAInjectAdapter"].includes(node.comfyClass)) takeDroppedPictures(node);
  },
});
