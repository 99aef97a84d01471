// Figures over the last two minutes.

import { svg } from "./drawing.js";

const SECONDS = 120;
const GAP = 5; // seconds without a figure, over which no line is drawn
const HEIGHT = 40;

export class Chart {
  #samples = [];
  #lines;
  #area = svg("path", { class: "area line-0" });
  #picture;
  #top = document.createElement("span");
  #legend = document.createElement("figcaption");

  #names;
  #show;
  #least;

  /**
   * Of `names`' figures, the first of which is filled.
   *
   * `show` makes a text of one; the picture reaches up to `least` of them at least.
   */
  constructor(key, names, show, least) {
    this.#names = names;
    this.#show = show;
    this.#least = least;
    this.#lines = names.map((_, index) => svg("path", { class: `line line-${index}` }));
    this.#picture = svg(
      "svg",
      { viewBox: `0 0 ${SECONDS} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      this.#area,
      ...this.#lines,
    );
    this.#top.className = "top";
    const frame = document.createElement("div");
    frame.className = "frame";
    frame.append(this.#picture, this.#top);
    this.element = document.createElement("figure");
    this.element.dataset.chart = key;
    this.element.append(this.#legend, frame);
  }

  /** Takes figures in that are of `now`, in seconds, and may be `most`. */
  add(now, figures, most = Infinity) {
    this.#samples = this.#samples.filter((each) => each.now > now - SECONDS);
    this.#samples.push({ now, figures });
    const greatest = Math.max(...this.#samples.flatMap((each) => each.figures));
    const top = Math.max(1, Math.min(most, powerOfTwo(Math.max(this.#least, greatest))));
    const runs = runsOf(this.#samples);
    const place = (index) => (each) =>
      `${(SECONDS - now + each.now).toFixed(2)} ${(HEIGHT * (1 - each.figures[index] / top)).toFixed(2)}`;
    this.#lines.forEach((line, index) => {
      line.setAttribute("d", runs.map((run) => `M${run.map(place(index)).join("L")}`).join(""));
    });
    const foot = (each) => `${(SECONDS - now + each.now).toFixed(2)} ${HEIGHT}`;
    const around = (run) => [foot(run[0]), ...run.map(place(0)), foot(run.at(-1))];
    this.#area.setAttribute("d", runs.map((run) => `M${around(run).join("L")}Z`).join(""));
    this.#tell(figures, top, most);
  }

  #tell(figures, top, most) {
    const texts = this.#names.map((name, index) => `${name} ${this.#show(figures[index])}`);
    if (most < Infinity) texts.push(`total ${this.#show(most)}`);
    const parts = texts.map((text, index) => {
      const part = document.createElement("span");
      part.className = index < this.#names.length ? `key line-${index}` : "";
      part.textContent = text;
      return part;
    });
    this.#legend.replaceChildren(...parts);
    this.#top.textContent = this.#show(top);
    this.#picture.setAttribute("aria-label", texts.join(", "));
  }
}

function runsOf(samples) {
  const runs = [];
  for (const each of samples) {
    const last = runs.at(-1)?.at(-1);
    if (last && each.now - last.now <= GAP) runs.at(-1).push(each);
    else runs.push([each]);
  }
  return runs;
}

/** The least that is no less than `figure`. */
function powerOfTwo(figure) {
  return 2 ** Math.ceil(Math.log2(figure));
}
