// A member's vault as one bar, and all of them as a map: rows while they are few, cells when they are many.

import { chip, el, keyed, say, set } from "./dom.js";
import { bytes, count } from "./format.js";

export const STATES = [
  { key: "used", name: "in use", about: "read by running jobs" },
  { key: "lent", name: "lent", about: "held for other members" },
  { key: "idle", name: "cached", about: "idle KV that may be reused, evictable" },
  { key: "blank", name: "blank", about: "nothing in them" },
];
const FEW = 16;

const blocks = (worker) => ({
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
    const told = STATES.map((s) => `${count(parts[s.key])} ${s.name}`).join(", ");
    set(this.node, "aria-label", `${worker.id}: of ${count(worker.total)} blocks ${told}; ${count(worker.borrowed)} borrowed`);
  }
}

export const longest = (members) => Math.max(1, ...members.map((worker) => worker.total + worker.borrowed));

export const condition = (worker) => (worker.state === "silent" ? "silent" : worker.draining ? "draining" : "ok");

export class VaultMap {
  constructor() {
    this.rows = el("div", { class: "vault-rows" });
    this.cells = el("ul", { class: "vault-cells" });
    this.node = el("div", {}, this.rows, this.cells);
  }

  update(members) {
    const few = members.length <= FEW;
    const scale = longest(members);
    this.rows.hidden = !few;
    this.cells.hidden = few;
    keyed(this.rows, few ? members : [], (w) => w.id, (w) => this.makeRow(w), (node, w) => this.tellRow(node, w, scale));
    keyed(this.cells, few ? [] : members, (w) => w.id, (w) => this.makeCell(w), (node, w) => this.tellCell(node, w));
  }

  makeRow(worker) {
    const bar = new Bar();
    const state = chip("ok");
    const numbers = el("span", { class: "numbers" });
    const shelf = el("span", { class: "shelf" });
    const node = el("a", { class: "vault-row", href: `#/member/${encodeURIComponent(worker.id)}` },
      el("span", { class: "name" }, el("b", { text: worker.id }), state), bar.node, numbers, shelf);
    node.parts = { bar, state, numbers, shelf };
    return node;
  }

  tellRow(node, worker, scale) {
    if (node.worker === worker && node.scale === scale) return;
    Object.assign(node, { worker, scale });
    const { bar, state, numbers, shelf } = node.parts;
    bar.update(worker, scale);
    const now = condition(worker);
    set(node, "data-state", now);
    set(state, "data-state", now);
    say(state, now === "ok" ? worker.kind : now);
    say(numbers, `${count(worker.used + worker.lent)} of ${count(worker.total)} blocks`);
    const host = worker.tiers.find((tier) => tier.name === "host");
    say(shelf, worker.borrowed ? `+${count(worker.borrowed)} borrowed` : host ? `host ${bytes(host.bytes_used)}` : "");
  }

  makeCell(worker) {
    const bar = new Bar();
    const name = el("span", { class: "name", text: worker.id });
    const link = el("a", { href: `#/member/${encodeURIComponent(worker.id)}` }, name, bar.node);
    const node = el("li", { class: "vault-cell" }, link);
    node.parts = { bar, name };
    return node;
  }

  tellCell(node, worker) {
    if (node.worker === worker) return;
    node.worker = worker;
    const now = condition(worker);
    node.parts.bar.update(worker);
    set(node, "data-state", now);
    say(node.parts.name, now === "ok" ? worker.id : `${worker.id} · ${now}`);
    set(node.firstElementChild, "title", `${worker.used} in use, ${worker.lent} lent, ${worker.borrowed} borrowed, of ${worker.total} blocks`);
  }
}
