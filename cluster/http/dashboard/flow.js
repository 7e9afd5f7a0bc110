// Who lends to whom: lenders on the left, borrowers on the right, a ribbon as wide as the blocks between them.

import { el, keyed, say, set, svg } from "./dom.js";
import { count, plural, seconds } from "./format.js";

const W = 440;
const NODE = 10;
const LEFT = 112;
const RIGHT = W - 112;
const GAP = 10;
const MOST = 10;                  // pairs drawn; the rest is one line of text

export class Flow {
  constructor() {
    this.ribbons = svg("g");
    this.nodes = svg("g");
    this.svg = svg("svg", { role: "img", class: "flow" }, this.ribbons, this.nodes);
    this.empty = el("p", { class: "empty", text: "Nothing is lent now. A job that needs more blocks than its worker has borrows them from neighbours." });
    this.more = el("p", { class: "about" });
    this.node = el("div", {}, this.svg, this.empty, this.more);
  }

  update(flows) {
    this.empty.hidden = flows.length > 0;
    this.svg.classList.toggle("gone", !flows.length);
    const drawn = flows.slice(0, MOST);
    const rest = flows.slice(MOST);
    this.more.hidden = !rest.length;
    if (rest.length) {
      say(this.more, `and ${plural(rest.length, "smaller pair")} with ${plural(rest.reduce((sum, f) => sum + f.blocks, 0), "block")}`);
    }
    const signature = JSON.stringify(drawn);
    if (signature === this.signature) return;
    this.signature = signature;
    this.draw(drawn);
  }

  draw(flows) {
    const total = flows.reduce((sum, flow) => sum + flow.blocks, 0) || 1;
    const sides = ["lender", "borrower"].map((side) => {
      const sums = new Map();
      for (const flow of flows) sums.set(flow[side], (sums.get(flow[side]) || 0) + flow.blocks);
      return sums;
    });
    const most = Math.max(sides[0].size, sides[1].size, 1);
    const height = Math.max(170, most * 46);
    set(this.svg, "viewBox", `0 0 ${W} ${height}`);
    const room = height - (most - 1) * GAP - 16;
    const scale = Math.min(room / total, 6);
    const places = sides.map((sums) => {
      const sizes = [...sums].map(([name, blocks]) => [name, blocks, Math.max(6, blocks * scale)]);
      let y = (height - sizes.reduce((sum, [, , size]) => sum + size + GAP, -GAP)) / 2;
      const found = new Map();
      for (const [name, blocks, size] of sizes) {
        found.set(name, { name, blocks, y, size, used: 0 });
        y += size + GAP;
      }
      return found;
    });
    keyed(this.ribbons, flows, (f) => f.name, () => this.ribbon(), (node, flow) => this.place(node, flow, places));
    const boxes = places.flatMap((found, side) => [...found.values()].map((box) => ({ ...box, side })));
    keyed(this.nodes, boxes, (b) => `${b.side} ${b.name}`, (b) => this.box(b), (node, b) => this.placeBox(node, b));
    set(this.svg, "aria-label", `Loans: ${flows.map((f) => `${f.lender} lends ${f.blocks} blocks to ${f.borrower}`
      + (f.recalled ? `, ${f.recalled} recalled` : "")).join("; ") || "none"}`);
  }

  ribbon() {
    const path = svg("path", { class: "ribbon" });
    const label = svg("text", { class: "ribbon-label" });
    const title = svg("title");
    const node = svg("g", {}, path, label, title);
    node.parts = { path, label, title };
    return node;
  }

  place(node, flow, [lenders, borrowers]) {
    const [from, to] = [lenders.get(flow.lender), borrowers.get(flow.borrower)];
    const a = (flow.blocks / from.blocks) * from.size;
    const b = (flow.blocks / to.blocks) * to.size;
    const [y0, y1] = [from.y + from.used, to.y + to.used];
    from.used += a;
    to.used += b;
    const [x0, x1, mid] = [LEFT + NODE, RIGHT - NODE, W / 2];
    set(node.parts.path, "d", `M${x0} ${y0}C${mid} ${y0} ${mid} ${y1} ${x1} ${y1}V${y1 + b}C${mid} ${y1 + b} ${mid} ${y0 + a} ${x0} ${y0 + a}Z`);
    node.parts.path.classList.toggle("recalled", flow.recalled > 0);
    set(node.parts.label, "x", x0 + 10);
    set(node.parts.label, "y", y0 + a / 2 + 4);
    set(node.parts.label, "visibility", a < 11 ? "hidden" : null);
    say(node.parts.label, flow.recalled ? `${count(flow.blocks)} · ${count(flow.recalled)} recalled` : count(flow.blocks));
    say(node.parts.title, `${plural(flow.blocks, "block")} in ${plural(flow.loans, "loan")}, term ${seconds(flow.term_s)}, ${flow.recalled} recalled`);
  }

  box(box) {
    const node = svg("g", {}, svg("rect", { class: box.side ? "borrowed" : "lent", width: NODE, rx: 2 }),
      svg("text", { class: "node-name" }), svg("text", { class: "node-blocks" }));
    return node;
  }

  placeBox(node, box) {
    const [rect, name, blocks] = node.children;
    set(rect, "x", box.side ? RIGHT - NODE : LEFT);
    set(rect, "y", box.y);
    set(rect, "height", box.size);
    const short = box.name.length > 15 ? `${box.name.slice(0, 14)}…` : box.name;
    for (const [label, text, dy] of [[name, short, -1], [blocks, `${box.side ? "borrows" : "lends"} ${count(box.blocks)}`, 12]]) {
      set(label, "x", box.side ? RIGHT + 8 : LEFT - 8);
      set(label, "text-anchor", box.side ? "start" : "end");
      set(label, "y", box.y + box.size / 2 + dy);
      say(label, text);
    }
  }
}
