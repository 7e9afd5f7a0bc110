// Parts of a whole as rows: a name, a bar, the share, the count. The whole is named in the card's subtitle.

import { css, el, keyed, say } from "./dom.js";
import { count, share } from "./format.js";

const SOURCES = {
  device: "this worker's own blocks", peer: "a neighbour's cache", host: "host memory", disk: "disk", redis: "Redis",
  blend: "blended", prefix: "a running job's prefix",
};
const REASONS = {
  never_seen: "never seen before", last_block: "part of a block, or the last token", evicted: "evicted since",
  integrity: "stored bytes were wrong", timeout: "a tier was too slow", tier_down: "a tier was down", over_limit: "did not fit a tier",
};

export const words = (name) => name.replaceAll("_", " ");
export const sourceAbout = (name) => SOURCES[name] || "";
export const reasonAbout = (name) => REASONS[name] || "";

export class Shares {
  // about(name): a few words more. tint: one colour for all rows, else each source has its own.
  constructor({ about, tint, empty }) {
    Object.assign(this, { about, tint });
    this.rows = el("ul", { class: "shares" });
    this.empty = el("p", { class: "empty", text: empty });
    this.node = el("div", {}, this.rows, this.empty);
  }

  // parts: {name: tokens}; whole: the denominator
  update(parts, whole) {
    const rows = Object.entries(parts).filter(([, tokens]) => tokens > 0).sort((a, b) => b[1] - a[1]);
    this.empty.hidden = rows.length > 0;
    this.rows.hidden = !rows.length;
    keyed(this.rows, rows, ([name]) => name, ([name]) => this.make(name), (node, [, tokens]) => {
      css(node.parts.bar, "width", `${Math.min(100, (100 * tokens) / (whole || 1)).toFixed(1)}%`);
      say(node.parts.share, share(tokens, whole));
      say(node.parts.count, count(tokens));
    });
  }

  make(name) {
    const bar = el("span", { class: `fill ${this.tint || `source-${name.replace(/[^a-z_]/g, "")}`}` });
    const [portion, tokens] = [el("span", { class: "share" }), el("span", { class: "tokens" })];
    const node = el("li", {}, el("span", { class: "label", text: words(name), title: this.about(name) }),
      el("span", { class: "track" }, bar), portion, tokens);
    node.parts = { bar, share: portion, count: tokens };
    return node;
  }
}
