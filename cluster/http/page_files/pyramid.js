// Where a conversation's tokens are: the first layer at the foot, what is on the device in the middle.

import { svg } from "./drawing.js";

const HEIGHT = 210; // of all layers, in pixels
const THINNEST = 3;
const THICKEST = 18;

/** Draws where the `layers` of a receipt have their tokens in place of what `picture` shows. */
export function drawPyramid(picture, layers) {
  draw(
    picture,
    layers.map((layer) => {
      const device = layer.prompt_kept + layer.generated_kept;
      const kept = device + layer.spilled;
      const all = kept + layer.dropped;
      const told =
        `${device} on the device (${layer.prompt_kept} of the prompt, ${layer.generated_kept} generated), ` +
        `${layer.spilled} in host memory, ${layer.dropped} dropped`;
      return { device, all, told, bars: { dropped: all, host: kept, device } };
    }),
  );
}

/** Draws how many of all tokens each layer has on the device while a reply runs. */
export function drawPlan(picture, tokens) {
  draw(
    picture,
    tokens.device.map((device) => {
      const told = `${device} on the device of ${tokens.all}`;
      return { device, all: tokens.all, told, bars: { away: tokens.all, device } };
    }),
  );
}

function draw(picture, rows) {
  const thick = Math.min(THICKEST, Math.max(THINNEST, HEIGHT / rows.length));
  picture.setAttribute("height", thick * rows.length);
  picture.setAttribute("aria-label", told(rows));
  picture.replaceChildren(
    ...rows.map((row, layer) => drawn(row, layer, (rows.length - 1 - layer) * thick, thick)),
  );
}

/** The bars of a layer; each is in the middle of the one before, which looks out at both sides. */
function drawn({ all, told, bars }, layer, top, thick) {
  const bar = ([kind, tokens]) => {
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
  const title = svg("title", {}, `Layer ${layer}: ${told}`);
  return svg("g", { "data-layer": layer }, title, ...Object.entries(bars).map(bar));
}

function told(rows) {
  const sum = (count) => rows.reduce((total, row) => total + count(row), 0);
  const share = sum((row) => row.device) / sum((row) => row.all);
  return `${rows.length} layers; ${Math.round(100 * share)} % of the tokens are on the device`;
}
