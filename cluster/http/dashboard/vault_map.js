// All vaults as a map: rows while they are few, cells when they are many.

import { chip, el, keyed, say, set, svg } from "./dom.js";
import { bytes, count } from "./format.js";
import { Bar, STATES, blocks, condition, longest, spoken } from "./vault.js";

const FEW = 16;
const HIGH = 8;                    // of a cell's bar, and its corners: pixels
const ROUND = 3;
const GAP = 2;                     // before what is borrowed elsewhere
const PARTS = [...STATES.map((s) => s.key), "borrowed"];

export class VaultMap {
  constructor() {
    this.rows = el("div", { class: "vault-rows" });
    this.cells = new Cells();
    this.node = el("div", {}, this.rows, this.cells.node);
  }

  update(members) {
    const few = members.length <= FEW;
    const scale = longest(members);
    this.rows.hidden = !few;
    this.cells.node.hidden = few;
    keyed(this.rows, few ? members : [], (w) => w.id, (w) => this.makeRow(w), (node, w) => this.tellRow(node, w, scale));
    this.cells.update(few ? [] : members);
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
}

// All bars of a field of cells are one drawing of five paths: an update sets five attributes, however many members changed,
// and touches neither style nor layout of the cells.
class Cells {
  constructor() {
    this.list = el("ul", { class: "vault-cells" });
    this.paths = PARTS.map((part) => svg("path", { class: part }));
    const bars = svg("svg", { class: "vault-bars", "aria-hidden": "true" }, this.paths);
    this.node = el("div", { class: "vault-field" }, this.list, bars);
    this.names = "";
    new ResizeObserver(() => { this.find(); this.draw(); }).observe(this.list);
  }

  update(members) {
    let stale = false;
    keyed(this.list, members, (w) => w.id, make, (node, worker) => {
      if (node.worker === worker) return;
      stale = true;
      tell(node, worker);
    });
    const names = members.map((worker) => worker.id).join("\n");
    if (names !== this.names) {
      this.names = names;
      this.find();
    } else if (!stale) return;
    this.draw();
  }

  // Where each bar is. Reads the layout: only when members came or went, or the field got another size.
  find() {
    for (const node of this.list.children) {
      const { offsetLeft: x, offsetTop: y, offsetWidth: width } = node.parts.bar;
      Object.assign(node, { place: { x, y, width }, pieces: null });
    }
  }

  draw() {
    const drawn = PARTS.map(() => "");
    for (const node of this.list.children) {
      node.pieces ||= bar(node.worker, node.place);
      node.pieces.forEach((piece, i) => { drawn[i] += piece; });
    }
    drawn.forEach((d, i) => set(this.paths[i], "d", d));
  }
}

function make(worker) {
  const name = el("span", { class: "name" });
  const bar = el("span", { class: "vault-place", role: "img" });
  const link = el("a", { href: `#/member/${encodeURIComponent(worker.id)}` }, name, bar);
  const node = el("li", { class: "vault-cell" }, link);
  node.parts = { bar, link, name };
  return node;
}

function tell(node, worker) {
  Object.assign(node, { worker, pieces: null });
  const { bar, link, name } = node.parts;
  const now = condition(worker);
  set(node, "data-state", now);
  say(name, now === "ok" ? worker.id : `${worker.id} · ${now}`);
  set(bar, "aria-label", spoken(worker));
  set(link, "title", `${worker.used} in use, ${worker.lent} lent, ${worker.borrowed} borrowed, of ${worker.total} blocks`);
}

// A bar's piece of each path, in whole pixels; empty where it has no such blocks.
function bar(worker, { x, y, width }) {
  const parts = blocks(worker);
  const whole = worker.total + worker.borrowed || 1;
  const to = (upTo) => Math.round((width * upTo) / whole);
  let upTo = 0;
  const pieces = STATES.map(({ key }) => piece(to(upTo), to((upTo += parts[key]))));
  return [...pieces, piece(to(upTo) + GAP, to(upTo + worker.borrowed))];

  // Round where the bar begins and ends.
  function piece(from, end) {
    const size = end - from;
    if (size <= 0) return "";
    const left = from === 0 ? Math.min(ROUND, size) : 0;
    const right = end === width ? Math.min(ROUND, size - left) : 0;
    return `M${x + from + left} ${y}H${x + end - right}`
      + `q${right} 0 ${right} ${right}v${HIGH - 2 * right}q0 ${right} ${-right} ${right}`
      + `H${x + from + left}q${-left} 0 ${-left} ${-left}v${2 * left - HIGH}q0 ${-left} ${left} ${-left}z`;
  }
}
