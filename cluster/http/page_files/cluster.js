// The cluster's queue and pools over time.

import { Chart } from "./chart.js";

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const COUNTS = { show: count, least: 4 };
const BYTES = { show: bytes, least: 2 ** 20 };

/** Charts of the states of a cluster that are `add`ed, in `place`. */
export class Cluster {
  #place;
  #shown = new Map();

  constructor(place) {
    this.#place = place;
  }

  /** Takes a state in as it is `now`, in seconds; pipelines that are gone are shown no more. */
  add(now, state) {
    const kept = new Map();
    const chart = (key, names, { show, least }, figures, most) => {
      kept.set(key, this.#shown.get(key) ?? new Chart(key, names, show, least));
      kept.get(key).add(now, figures, most);
      return kept.get(key).element;
    };
    const queue = chart("queue", ["running", "queued"], COUNTS, [state.running, state.queued]);
    const pools = state.pipelines.flatMap((pipeline) =>
      pipeline.stages.flatMap((stage, rank) => {
        const key = `${pipeline.pipeline_id}/${rank}`;
        const pages = [stage.pages_in_use, stage.pages_reserved];
        return [
          heading(`Layers ${stage.first_layer} to ${stage.end_layer - 1}`, pipeline.pipeline_id),
          chart(`pages ${key}`, ["pages in use", "reserved"], COUNTS, pages, stage.pages_total),
          chart(`host ${key}`, ["host"], BYTES, [stage.host_bytes], stage.host_bytes_limit),
        ];
      }),
    );
    this.#shown = kept;
    this.#place.replaceChildren(heading("Requests"), queue, ...pools);
  }
}

function heading(text, more = "") {
  const made = document.createElement("h3");
  const aside = document.createElement("small");
  aside.textContent = more;
  made.append(text, " ", aside);
  return made;
}

function count(figure) {
  return figure.toLocaleString("en");
}

function bytes(figure) {
  const unit = Math.min(UNITS.length - 1, Math.floor(Math.log2(Math.max(1, figure)) / 10));
  return `${(figure / 1024 ** unit).toFixed(unit && figure % 1024 ** unit ? 1 : 0)} ${UNITS[unit]}`;
}
