// The first page: how the cluster is, at a glance.

import { Chart } from "./chart.js";
import { card, chip, css, el, keyed, say, set } from "./dom.js";
import { eventLine } from "./events.js";
import { Flow } from "./flow.js";
import { NONE, bytes, count, plural, seconds, share, span } from "./format.js";
import { isOver } from "./cluster.js";
import { BRIEF, jobTable } from "./jobs.js";
import { Shares, reasonAbout, sourceAbout } from "./shares.js";
import { legend } from "./vault.js";
import { VaultMap } from "./vault_map.js";

class Figure {
  constructor(name) {
    this.value = el("b");
    this.second = el("small");
    this.about = el("dd", { class: "about" });
    this.node = el("div", { class: "figure" }, el("dt", { text: name }), el("dd", { class: "value" }, this.value, this.second), this.about);
  }

  tell(value, about, state, second) {
    say(this.value, value);
    say(this.second, second || "");
    say(this.about, about);
    set(this.node, "data-state", state || "ok");
  }
}

export class Overview {
  constructor() {
    this.title = "Overview";
    this.figures = Object.fromEntries(["Members", "Blocks taken", "Blocks lent", "Prompt reuse", "First token", "Per token", "Output"]
      .map((name) => [name, new Figure(name)]));
    this.map = new VaultMap();
    this.flow = new Flow();
    this.vaults = card("Vaults", "", legend(), this.map.node);
    this.loans = card("Loans", "", this.flow.node);
    this.sources = new Shares({ about: sourceAbout, empty: "No job ended in this time." });
    this.reasons = new Shares({ about: reasonAbout, tint: "source-computed", empty: "No prompt token was missed in this time." });
    this.reuse = card("Where prompt tokens came from", "", this.sources.node);
    this.misses = card("Why prompt tokens were computed", "", this.reasons.node);
    this.tiers = card("Shelves below the device", "all members together, now", el("ul", { class: "tiers" }), el("p", { class: "empty", text: "No host tier and no Redis here." }));
    this.charts = [
      new Chart({ title: "Blocks by state", stacked: true, format: count, floor: 8, limit: "total", series: [
        { key: "used", name: "in use", class: "used" }, { key: "lent", name: "lent", class: "lent" }, { key: "idle", name: "cached", class: "idle" }] }),
      new Chart({ title: "Output tokens per second", format: (v) => (v === null ? NONE : `${count(v)} /s`), axis: count, floor: 10,
        series: [{ key: "tokens_per_s", name: "tokens", class: "used" }] }),
      new Chart({ title: "Time to first token", format: seconds, axis: (v) => (v === 0 ? "0 s" : seconds(v)), floor: 0.01,
        series: [{ key: "ttft_p50", name: "p50", class: "used" }, { key: "ttft_p99", name: "p99", class: "lent" }] }),
    ];
    this.jobs = jobTable("Jobs that run or wait, and the last that ended", BRIEF);
    this.noJobs = el("p", { class: "empty", text: "No job came to this gateway yet. Send one: kvbank submit, or POST /v1/jobs." });
    this.events = el("ul", { class: "events" });
    this.quiet = el("p", { class: "empty", text: "Nothing happened yet since the gateway started." });
    const abouts = ["blocks of all members, of all there are", "of all jobs, each second", "of the jobs that ended in the 5 min before"];
    this.node = el("div", { class: "page" },
      el("h1", { class: "unseen", text: "Overview" }),
      el("dl", { class: "figures" }, Object.values(this.figures).map((figure) => figure.node)),
      el("div", { class: "two" }, this.vaults.node, this.loans.node),
      el("div", { class: "three" }, this.reuse.node, this.misses.node, this.tiers.node),
      el("div", { class: "three" }, this.charts.map((chart, i) => card(chart.title, abouts[i], chart.node).node)),
      el("div", { class: "two" }, card("Jobs", "running and waiting now, then those that ended last", this.jobs.node, this.noJobs).node,
        card("What happened", "newest first", this.events, this.quiet).node));
  }

  update(cluster) {
    this.tellFigures(cluster, cluster.totals());
    const members = cluster.members();
    say(this.vaults.note, `${plural(members.length, "member")}, blocks by state, now`);
    this.map.update(members);
    const flows = cluster.flows();
    say(this.loans.note, flows.length ? `${plural(cluster.loans.size, "open loan")}, blocks from lender to borrower, now` : "blocks from lender to borrower, now");
    this.flow.update(flows);
    const { recent, window_s } = cluster.window;
    say(this.reuse.note, `of ${plural(recent.prompt_tokens, "prompt token")} in ${plural(recent.jobs, "ended job")}, ${span(window_s)}`);
    say(this.misses.note, `tokens, of ${plural(recent.prompt_tokens, "prompt token")}, ${span(window_s)}`);
    const reused = Object.values(recent.reused).reduce((sum, n) => sum + n, 0);
    this.sources.update({ ...recent.reused, computed: Math.max(0, recent.prompt_tokens - reused) }, recent.prompt_tokens);
    this.reasons.update(recent.missed, recent.prompt_tokens);
    this.tellTiers(cluster.tiers);
    for (const chart of this.charts) chart.update(cluster.series, cluster.at);
    const jobs = cluster.jobRows();
    const latestJobs = [...jobs.filter((job) => !isOver(job)), ...jobs.filter(isOver)].slice(0, 9);
    this.noJobs.hidden = jobs.length > 0;
    this.jobs.node.hidden = !jobs.length;
    this.jobs.update(latestJobs);
    const latest = cluster.events.slice(-9).reverse();
    this.quiet.hidden = latest.length > 0;
    keyed(this.events, latest, (event) => event.number, eventLine, () => {});
  }

  tellFigures(cluster, sum) {
    const { recent, ever, window_s, ttft_s, token_s } = cluster.window;
    const f = this.figures;
    const answering = sum.members - sum.silent;
    const about = [sum.silent ? `${count(sum.silent)} silent` : "all answer", sum.draining ? `${count(sum.draining)} draining` : ""];
    f.Members.tell(`${count(answering)} of ${count(sum.members)}`, `${about.filter(Boolean).join(", ")}, now`, sum.silent || !sum.members ? "bad" : "ok");
    f["Blocks taken"].tell(share(sum.used + sum.lent, sum.total), `${count(sum.used + sum.lent)} of ${count(sum.total)} blocks, now`,
      sum.total && (sum.used + sum.lent) / sum.total > 0.95 ? "warn" : "ok");
    f["Blocks lent"].tell(count(sum.lent), `in ${plural(cluster.loans.size, "loan")}, now`);
    const reused = (sums) => Object.values(sums.reused).reduce((total, n) => total + n, 0);
    f["Prompt reuse"].tell(share(reused(recent), recent.prompt_tokens),
      recent.jobs ? `of ${plural(recent.prompt_tokens, "token")}, ${span(window_s)}`
        : `no job in ${span(window_s)}; ${share(reused(ever), ever.prompt_tokens)} since the start`);
    const tell = (figure, p) => figure.tell(seconds(p.p50), p.count ? `p50 of ${plural(p.count, "job")}, ${span(window_s)}` : `no job ended, ${span(window_s)}`,
      "ok", p.count ? `p99 ${seconds(p.p99)}` : "");
    tell(f["First token"], ttft_s);
    tell(f["Per token"], token_s);
    const point = cluster.series[cluster.series.length - 1];
    f.Output.tell(point ? count(point.tokens_per_s) : NONE, point ? `${count(point.running)} running, ${count(point.queued)} queued, now` : "", "ok", "tokens/s");
  }

  tellTiers(tiers) {
    const [list, empty] = this.tiers.body.children;
    empty.hidden = tiers.length > 0;
    list.hidden = !tiers.length;
    keyed(list, tiers, (tier) => tier.name, makeTier, tellTier);
  }
}

const BREAKER = { ok: "answers", open: "breaker open", half_open: "breaker half open", off: "off" };

export function makeTier(tier) {
  const parts = { state: chip("ok"), bar: el("span", { class: `fill source-${tier.name.replace(/[^a-z]/g, "")}` }), bytes: el("span", { class: "numbers" }), more: el("p", { class: "about" }) };
  const node = el("li", {}, el("div", { class: "tier-head" }, el("b", { text: tier.name }), parts.state, parts.bytes), el("span", { class: "track" }, parts.bar), parts.more);
  node.parts = parts;
  return node;
}

export function tellTier(node, tier) {
  const { state, bar, bytes: size, more } = node.parts;
  set(state, "data-state", tier.state);
  say(state, BREAKER[tier.state] || tier.state);
  css(bar, "width", `${tier.bytes_limit ? Math.min(100, (100 * tier.bytes_used) / tier.bytes_limit).toFixed(1) : 0}%`);
  say(size, `${bytes(tier.bytes_used)} of ${bytes(tier.bytes_limit)}`);
  const counters = tier.counters || {};
  const asked = (counters.hits || 0) + (counters.misses || 0);
  say(more, `${plural(tier.frames, "frame")}${asked ? `; ${share(counters.hits || 0, asked)} of ${count(asked)} reads found, since the start` : ""}`);
}
