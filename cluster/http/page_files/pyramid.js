// Where a conversation's tokens are: the first layer at the foot, what is on the device in the middle.

import { svg } from "./drawing.js";

const HEIGHT = 210; // of all layers, in pixels
const THINNEST = 3;
const THICKEST = 18;

/** Draws `layers` of a receipt in place of what `picture` shows. */
export function drawPyramid(picture, layers) {
  const thick = Math.min(THICKEST, Math.max(THINNEST, HEIGHT / layers.length));
  picture.setAttribute("height", thick * layers.length);
  picture.setAttribute("aria-label", told(layers));
  const rows = layers.map((layer, index) => row(layer, (layers.length - 1 - index) * thick, thick));
  picture.replaceChildren(...rows);
}

function row(layer, top, thick) {
  const device = layer.prompt_kept + layer.generated_kept;
  const all = device + layer.spilled + layer.dropped;
  const bar = (kind, tokens) => {
    const width = all && (100 * tokens) / all;
    return svg("rect", {
      class: kind,
      x: `${50 - width / 2}%`,
      width: `${width}%`,
      y: top,
      height: thick * 0.84,
      rx: 1.5,
    });
  };
  const title = svg(
    "title",
    {},
    `Layer ${layer.layer}: ${device} on the device (${layer.prompt_kept} of the prompt, ` +
      `${layer.generated_kept} generated), ${layer.spilled} in host memory, ${layer.dropped} dropped`,
  );
  // Each is in the middle of the one before, which looks out at both sides.
  const bars = [bar("dropped", all), bar("host", device + layer.spilled), bar("device", device)];
  return svg("g", { "data-layer": layer.layer }, title, ...bars);
}

function told(layers) {
  const sum = (count) => layers.reduce((total, layer) => total + count(layer), 0);
  const device = sum((layer) => layer.prompt_kept + layer.generated_kept);
  const all = device + sum((layer) => layer.spilled + layer.dropped);
  return `${layers.length} layers; ${Math.round((100 * device) / all)} % of the tokens are on the device`;
}
