// A member's vault as one bar: its states, their words and colours.

import { el, set } from "./dom.js";
import { count } from "./format.js";

export const STATES = [
  { key: "used", name: "in use", about: "read by running jobs" },
  { key: "lent", name: "lent", about: "held for other members" },
  { key: "idle", name: "cached", about: "idle KV that may be reused, evictable" },
  { key: "blank", name: "blank", about: "nothing in them" },
];

export const blocks = (worker) => ({
  used: worker.used, lent: worker.lent, idle: worker.idle, blank: Math.max(0, worker.free - worker.idle),
});

export function legend() {
  return el("ul", { class: "legend" },
    STATES.map((s) => el("li", { title: s.about }, el("i", { class: `key ${s.key}` }), s.name)),
    el("li", { title: "KV of its own jobs, at other members" }, el("i", { class: "key borrowed" }), "borrowed elsewhere"));
}

//     [ in use | lent | cached | blank ][ borrowed elsewhere ]            as long as its blocks, beside the other members'
//
// One node with a layer of colour per state, each as wide as all up to it: changes cost no layout, and little style.
export class Bar {
  constructor() {
    this.node = el("span", { class: "vault", role: "img" });
  }

  update(worker, longest = worker.total + worker.borrowed) {
    const parts = blocks(worker);
    const width = (upTo) => `${((100 * upTo) / longest).toFixed(2)}%`;
    let upTo = 0;
    const sizes = STATES.map(({ key }) => width((upTo += parts[key])));
    sizes.push(worker.borrowed ? `calc(${width(upTo)} + 2px)` : width(upTo), width(upTo + worker.borrowed));
    const drawn = sizes.join(", ");
    if (drawn !== this.drawn) this.node.style.backgroundSize = this.drawn = drawn;
    set(this.node, "aria-label", spoken(worker));
  }
}

// A bar in words.
export function spoken(worker) {
  const parts = blocks(worker);
  const told = STATES.map((s) => `${count(parts[s.key])} ${s.name}`).join(", ");
  return `${worker.id}: of ${count(worker.total)} blocks ${told}; ${count(worker.borrowed)} borrowed`;
}

export const longest = (members) => Math.max(1, ...members.map((worker) => worker.total + worker.borrowed));

export const condition = (worker) => (worker.state === "silent" ? "silent" : worker.draining ? "draining" : "ok");
