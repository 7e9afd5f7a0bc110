// Charts over time: lines, or areas on top of each other, with an axis, a legend that tells the last values, and a reading
// under the pointer. Drawn as SVG, so that they follow the theme; a gap in time is a gap in the line.

import { el, say, set, svg } from "./dom.js";
import { clock } from "./format.js";

const W = 420;
const H = 132;
const LEFT = 46;
const BOTTOM = 18;
const TOP = 8;
const GAP_S = 5;
const SPANS_S = [60, 120, 300];    // as much time as there is news of

export class Chart {
  // limit: the key of what the values can at most be, if there is such a thing: the top of the axis, then.
  // series: [{key, name, class}], bottom first when stacked. format: a value with its unit. floor: least top of the axis.
  constructor({ title, series, stacked = false, format, floor = 1, axis = format, limit = "" }) {
    Object.assign(this, { title, series, stacked, format, floor, axis, limit, points: [] });
    this.grid = svg("g", { class: "grid" });
    this.paths = series.map((s) => svg("path", { class: `${stacked ? "area" : "line"} ${s.class}` }));
    this.cursor = svg("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
    const drawn = stacked ? [...this.paths].reverse() : this.paths;          // each area goes down to the axis: lower ones on top
    this.svg = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title }, this.grid, drawn, this.cursor);
    this.values = series.map(() => el("b"));
    this.when = el("span", { class: "when" });
    const keys = series.map((s, i) => el("li", {}, el("i", { class: `key ${s.class}` }), `${s.name} `, this.values[i]));
    this.node = el("figure", { class: "chart" }, el("ul", { class: "legend" }, keys, el("li", {}, this.when)), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => { this.pointed = null; this.read(); });
    this.lines = [0, 1, 2].map(() => {
      const line = svg("line", { x1: LEFT, x2: W });
      const label = svg("text", { x: LEFT - 6, "text-anchor": "end" });
      this.grid.append(line, label);
      return { line, label };
    });
    this.since = svg("text", { x: LEFT, y: H - 3 });
    this.grid.append(this.since,
      svg("text", { x: W, y: H - 3, "text-anchor": "end", text: "now" }));
  }

  update(points, now) {
    const age = points.length ? now - points[0].at : 0;
    const spanned = SPANS_S.find((s) => s >= age) || SPANS_S[SPANS_S.length - 1];
    this.points = points.filter((p) => p.at > now - spanned);
    Object.assign(this, { now, spanned });
    say(this.since, `−${spanned / 60} min`);
    const top = this.scale();
    const x = (at) => LEFT + ((at - now + spanned) / spanned) * (W - LEFT);
    const y = (value) => TOP + (1 - value / top) * (H - BOTTOM - TOP);
    this.x = x;
    this.lines.forEach(({ line, label }, i) => {
      const value = (top * i) / 2;
      set(line, "y1", y(value)); set(line, "y2", y(value));
      set(label, "y", y(value) + 3.5);
      say(label, this.axis(value));
    });
    const places = this.points.map((point) => x(point.at).toFixed(1));
    const keys = this.series.map((s) => s.key);
    const told = (i) => (this.stacked ? (point) => keys.slice(0, i + 1).reduce((sum, key) => sum + (point[key] || 0), 0)
      : (point) => point[keys[i]]);
    this.paths.forEach((path, i) => set(path, "d", this.line(told(i), places, y)));
    this.read();
  }

  scale() {
    let top = this.floor;
    for (const point of this.points) {
      const value = this.stacked ? this.series.reduce((sum, s) => sum + (point[s.key] || 0), 0)
        : Math.max(...this.series.map((s) => point[s.key] || 0));
      top = Math.max(top, value, this.limit ? point[this.limit] : 0);
    }
    if (this.limit && top > this.floor) return top;
    const unit = 10 ** Math.floor(Math.log10(top));
    return [1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10].map((step) => step * unit).find((step) => step >= top * 0.999);
  }

  // The line through what `told` says of each point, closed along the axis when it is an area.
  line(told, places, y) {
    const runs = [];
    let last = -Infinity;
    this.points.forEach((point, i) => {
      const value = told(point);
      if (value === null || value === undefined) { last = -Infinity; return; }
      if (point.at - last > GAP_S) runs.push([]);
      last = point.at;
      runs[runs.length - 1].push(`${places[i]} ${y(value).toFixed(1)}`);
    });
    const close = (run) => (this.stacked ? `V${H - BOTTOM}H${run[0].split(" ")[0]}Z` : "");
    return runs.map((run) => `M${run.join("L")}${close(run)}`).join("");
  }

  point(event) {
    if (!this.points.length) return;
    const box = this.svg.getBoundingClientRect();
    const at = this.now - this.spanned + ((((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT)) * this.spanned;
    this.pointed = this.points.reduce((best, p) => (Math.abs(p.at - at) < Math.abs(best.at - at) ? p : best));
    this.read();
  }

  read() {
    if (this.pointed && !this.points.includes(this.pointed)) this.pointed = null;
    const point = this.pointed || this.points[this.points.length - 1];
    this.series.forEach((s, i) => say(this.values[i], point ? this.format(point[s.key]) : "–"));
    say(this.when, this.pointed ? `at ${clock(this.pointed.at)}` : "");
    set(this.cursor, "visibility", this.pointed ? "visible" : "hidden");
    if (this.pointed) { set(this.cursor, "x1", this.x(this.pointed.at)); set(this.cursor, "x2", this.x(this.pointed.at)); }
    const told = point ? this.series.map((s) => `${s.name} ${this.format(point[s.key])}`).join(", ") : "nothing yet";
    set(this.svg, "aria-label", `${this.title}: ${told}`);
  }
}
