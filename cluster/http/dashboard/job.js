// One job: what it did when, its receipt, and the pin of its prompt.

import { card, chip, el, keyed, say, set, svg, table } from "./dom.js";
import { NONE, clock, count, plural, seconds } from "./format.js";
import { Shares, reasonAbout, sourceAbout } from "./shares.js";

const LEFT = 132;
const LANE = 34;
export const PHASES = ["queued", "accepted", "waiting", "fetching", "prefill", "replay", "decode"];

export class Job {
  constructor(id, ask, actions) {
    Object.assign(this, { id, ask, title: "Job" });
    this.name = el("h1", { text: "Job" });
    this.state = chip("ok", "loading");
    this.facts = el("dl", { class: "facts" });
    this.svg = svg("svg", { class: "timeline", role: "img" });
    this.moments = table("Moments of this job", [{ name: "At", number: true }, { name: "Phase" }, { name: "Lasted", number: true },
      { name: "Attempt", number: true }, { name: "Worker" }, { name: "Note" }]);
    this.sources = new Shares({ about: sourceAbout, empty: "The receipt comes with the end of the job." });
    this.reasons = new Shares({ about: reasonAbout, tint: "source-computed", empty: "Nothing was missed, or the job still runs." });
    this.receipt = el("dl", { class: "facts" });
    this.timeline = card("Timeline", "seconds since admission", el("ul", { class: "legend" }, PHASES.map((p) =>
      el("li", {}, el("i", { class: `key phase-${p}` }), p)), el("li", {}, el("i", { class: "key borrowed" }), "borrowed blocks"), el("li", {}, el("i", { class: "key first" }), "first token")),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Timeline" }, this.svg),
    el("details", {}, el("summary", { text: "The same as a table" }), this.moments.node));
    this.reuse = card("Prompt tokens by source", "", this.sources.node);
    this.misses = card("Computed, and why", "", this.reasons.node);
    this.buttons = actions.ofJob(id);
    this.problem = el("p", { class: "empty", text: "Loading this job." });
    this.rest = el("div", { hidden: true }, this.timeline.node, el("div", { class: "three" }, this.reuse.node, this.misses.node,
      card("Receipt", "of the whole job", this.receipt).node));
    this.node = el("div", { class: "page" }, el("p", { class: "crumbs" }, el("a", { href: "#/jobs", text: "Jobs" })),
      el("div", { class: "title" }, this.name, this.state, this.buttons.node), this.facts, this.problem, this.rest);
  }

  async update(cluster) {
    if (this.asking || (this.over && this.row === cluster.jobs.get(this.id))) return;
    this.asking = true;
    this.row = cluster.jobs.get(this.id);
    this.allowed = cluster.facts.actions;
    const { ok, body } = await this.ask(`/v1/ops/jobs/${encodeURIComponent(this.id)}`);
    this.asking = false;
    if (ok) this.tell(body);
    else if (this.rest.hidden || !body) say(this.problem, body ? body.error.message : "The gateway does not answer.");
  }

  tell(job) {
    this.over = job.total_s !== null;
    this.problem.hidden = true;
    this.rest.hidden = false;
    say(this.name, job.name);
    this.buttons.update(job, this.allowed);
    this.title = `Job ${job.name}`;
    const state = this.over ? job.outcome : job.phase;
    set(this.state, "data-state", job.state === "failed" ? "bad" : state);
    say(this.state, state);
    facts(this.facts, [["Tenant", job.tenant], ["Worker", job.worker || NONE], ["Admitted", clock(job.created)],
      ["Attempts", count(job.attempt)], ["Prompt", plural(job.prompt_tokens, "token")],
      ["Output", `${count(job.output_tokens)} of ${plural(job.max_tokens, "token")}`],
      ["First token after", seconds(job.ttft_s)], [this.over ? "Took" : "Runs for", seconds(job.age_s)]]);
    this.draw(job);
    const r = job.receipt;
    say(this.reuse.note, `of ${plural(job.prompt_tokens, "prompt token")}`);
    say(this.misses.note, `tokens, of ${plural(job.prompt_tokens, "prompt token")}`);
    this.sources.update(this.over ? { ...r.reused, computed: Math.max(0, job.prompt_tokens - job.reused) } : {}, job.prompt_tokens);
    this.reasons.update(r.missed || {}, job.prompt_tokens);
    facts(this.receipt, this.over ? [
      ["Tokens computed", count(r.computed_tokens)], ["Recomputed after a fault", count(r.recomputed_after_fault)],
      ["Blocks borrowed, at most", count(r.borrowed_blocks_peak)], ["Lenders", r.lenders.join(", ") || NONE],
      ["Blocks parked on the host, at most", count(r.parked_blocks_peak)],
      ["Remote attention calls", count(r.remote_attention_calls)], ["First token", seconds(r.ttft_s)], ["Total", seconds(r.total_s)],
    ] : [["Receipt", "comes with the end of the job"]]);
  }

  draw(job) {
    const { moments, borrowed, left_out } = job.timeline;
    const end = Math.max(job.age_s, 1e-3);
    const width = Math.max(640, Math.round(this.svg.parentNode.clientWidth) || 960);
    const x = (at) => LEFT + (Math.min(at, end) / end) * (width - LEFT - 22);
    const laneOf = (m) => Math.max(1, m.attempt);         // before the first attempt it waits for that
    const lanes = [...new Set(moments.map(laneOf))].sort((a, b) => a - b);
    const height = (lanes.length + 1) * LANE + 26;
    set(this.svg, "viewBox", `0 0 ${width} ${height}`);
    const parts = [];
    const step = niceStep(end / 8);
    for (let i = 0; i * step <= end; i += 1) {
      const at = i * step;
      parts.push(svg("line", { class: "tick", x1: x(at), x2: x(at), y1: 4, y2: height - 20 }),
        svg("text", { class: "tick-label", x: x(at), y: height - 5, "text-anchor": "middle", text: `${Number(at.toPrecision(3))} s` }));
    }
    const rows = moments.map((m, i) => ({ ...m, until: i + 1 < moments.length ? moments[i + 1].at_s : end, key: String(i) }));
    lanes.forEach((attempt, lane) => {
      const y = lane * LANE + 6;
      const mine = rows.filter((m) => laneOf(m) === attempt);
      const worker = mine.map((m) => m.worker).filter(Boolean).pop() || "";
      parts.push(svg("text", { class: "lane", x: 0, y: y + 10, text: `attempt ${attempt}` }),
        svg("text", { class: "lane-about", x: 0, y: y + 22, text: worker.length > 22 ? `${worker.slice(0, 21)}…` : worker }));
      for (const m of mine) {
        const size = Math.max(1.5, x(m.until) - x(m.at_s));
        const label = size > 56 ? svg("text", { class: `phase-label on-${m.phase}`, x: x(m.at_s) + 6, y: y + 15, text: m.phase }) : null;
        parts.push(svg("g", {}, svg("rect", { class: `phase-${m.phase}`, x: x(m.at_s), y, width: size, height: LANE - 12, rx: 2 }), label,
          svg("title", { text: `${m.phase} ${m.note ? `(${m.note}) ` : ""}for ${seconds(m.until - m.at_s)}` })));
        if (m.note.startsWith("lost")) parts.push(svg("text", { class: "lost", x: Math.min(x(m.until), x(m.at_s) + 8) + 6, y: y + 15, text: m.note }));
      }
    });
    const base = lanes.length * LANE + 6;
    const most = Math.max(...borrowed.map(([, blocks]) => blocks), job.receipt.borrowed_blocks_peak || 0);
    const seen = Math.max(...borrowed.map(([, blocks]) => blocks), 0);
    parts.push(svg("text", { class: "lane", x: 0, y: base + 10, text: "borrowed" }),
      svg("text", { class: "lane-about", x: 0, y: base + 22, text: most ? `at most ${plural(most, "block")}` : "nothing" }));
    borrowed.forEach(([at, blocks], i) => {
      const until = i + 1 < borrowed.length ? borrowed[i + 1][0] : end;
      const size = ((LANE - 12) * blocks) / (seen || 1);
      parts.push(svg("g", {}, svg("rect", { class: "borrowed", x: x(at), y: base + LANE - 12 - size, width: Math.max(1.5, x(until) - x(at)), height: size }),
        svg("title", { text: `${plural(blocks, "block")} for ${seconds(until - at)}` })));
    });
    if (most && !borrowed.length) parts.push(svg("text", { class: "lane-about", x: LEFT, y: base + 15, text: "when is not known: nobody watched then" }));
    if (job.ttft_s !== null) {
      parts.push(svg("line", { class: "first", x1: x(job.ttft_s), x2: x(job.ttft_s), y1: 2, y2: base - 4 }, svg("title", { text: `first token after ${seconds(job.ttft_s)}` })));
    }
    this.svg.replaceChildren(...parts);
    const told = rows.map((m) => `${m.phase} ${seconds(m.until - m.at_s)}`).join(", ");
    set(this.svg, "aria-label", `Timeline: ${told}`);
    say(this.timeline.note, `seconds since admission; phases as the worker reports them, twice a second: what is shorter stays "queued"; borrowed blocks once a second while a dashboard is open${left_out ? `; ${left_out} later moments left out` : ""}`);
    keyed(this.moments.body, rows, (m) => m.key, () => el("tr", {}, [1, 0, 1, 1, 0, 0].map((n) => el("td", { class: n ? "number" : null }))), (row, m) => {
      [seconds(m.at_s), m.phase, seconds(m.until - m.at_s), m.attempt || NONE, m.worker || NONE, m.note || NONE].forEach((value, i) => say(row.children[i], value));
    });
  }
}

function niceStep(least) {
  const unit = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 2.5, 5, 10].map((n) => n * unit).find((n) => n >= least);
}

export function facts(list, pairs) {
  keyed(list, pairs, ([name]) => name, ([name]) => el("div", {}, el("dt", { text: name }), el("dd")), (node, [, value]) => say(node.lastChild, value));
}
