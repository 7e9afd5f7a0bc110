// Jobs of all tenants, as a table and as a page of it. Names and numbers only: no prompt and no output comes here.

import { card, chip, css, el, keyed, say, set, table } from "./dom.js";
import { NONE, count, plural, seconds, share } from "./format.js";
import { isOver } from "./cluster.js";

const COLUMNS = [
  { name: "Job" }, { name: "Tenant" }, { name: "State" }, { name: "Worker" }, { name: "Prompt, tokens", number: true },
  { name: "Output, tokens", number: true }, { name: "Borrowed, blocks", number: true }, { name: "First token", number: true },
  { name: "Total", number: true }, { name: "Reused", number: true },
];
export const BRIEF = [0, 2, 3, 4, 5, 6];
const ALL = COLUMNS.map((_, i) => i);

const stateOf = (job) => (isOver(job) ? job.outcome : job.phase || job.state);

// columns: numbers of those shown, in order.
export function jobTable(caption, columns = ALL) {
  const { node, body } = table(caption, columns.map((i) => COLUMNS[i]));
  return { node, update: (jobs) => keyed(body, jobs, (job) => job.id, (job) => make(job, columns), tell) };
}

function make(job, columns) {
  const cells = COLUMNS.map((column) => el("td", { class: column.number ? "number" : null }));
  const link = el("a", { href: `#/job/${encodeURIComponent(job.id)}`, text: job.name });
  const state = chip("ok");
  const progress = el("span", { class: "fill used" });
  const prompt = el("span");
  cells[0].append(link);
  cells[2].append(state);
  cells[4].append(prompt, el("span", { class: "track thin" }, progress));
  const row = el("tr", {}, columns.map((i) => cells[i]));
  row.parts = { cells, state, progress, prompt };
  return row;
}

function tell(row, job) {
  if (row.job === job) return;
  row.job = job;
  const { cells, state, progress, prompt } = row.parts;
  say(cells[1], job.tenant);
  set(state, "data-state", job.state === "failed" ? "bad" : stateOf(job));
  say(state, stateOf(job) + (job.waits_for ? `: ${job.waits_for}` : ""));
  say(cells[3], job.worker ? job.worker + (job.attempt > 1 ? ` (attempt ${job.attempt})` : "") : NONE);
  say(prompt, count(job.prompt_tokens));
  const computed = isOver(job) || job.output_tokens ? job.prompt_tokens : job.computed;
  css(progress, "width", `${Math.round((100 * computed) / (job.prompt_tokens || 1))}%`);
  say(cells[5], `${count(job.output_tokens)} of ${count(job.max_tokens)}`);
  say(cells[6], job.borrowed ? count(job.borrowed) : NONE);
  say(cells[7], seconds(job.ttft_s));
  say(cells[8], seconds(job.total_s));
  say(cells[9], isOver(job) ? share(job.reused, job.prompt_tokens) : NONE);
}

export class Jobs {
  constructor() {
    this.title = "Jobs";
    this.only = el("select", { id: "only", onchange: () => this.update(this.cluster) },
      ["all", "running or waiting", "ended well", "failed or cancelled"].map((name) => el("option", { text: name })));
    this.word = el("input", { id: "word", type: "search", autocomplete: "off", oninput: () => this.update(this.cluster) });
    this.table = jobTable("Jobs, newest first");
    this.empty = el("p", { class: "empty" });
    this.card = card("Jobs", "", el("div", { class: "filters" },
      el("label", { for: "only", text: "Show" }), this.only, el("label", { for: "word", text: "Name, tenant or worker" }), this.word),
    this.table.node, this.empty);
    this.node = el("div", { class: "page" }, el("h1", { class: "unseen", text: "Jobs" }), this.card.node);
  }

  update(cluster) {
    this.cluster = cluster;
    const word = this.word.value.trim().toLowerCase();
    const wanted = [() => true, (j) => !isOver(j), (j) => j.state === "finished", (j) => j.state === "failed" || j.state === "cancelled"][this.only.selectedIndex];
    const all = cluster.jobRows();
    const jobs = all.filter((job) => wanted(job) && (!word || `${job.name} ${job.tenant} ${job.worker}`.toLowerCase().includes(word)));
    say(this.card.note, `${plural(jobs.length, "job")} shown of ${count(all.length)}: those that run or wait, and the last 100 that ended`);
    this.empty.hidden = jobs.length > 0;
    this.table.node.hidden = !jobs.length;
    say(this.empty, all.length ? "No job fits this filter." : "No job came to this gateway yet.");
    this.table.update(jobs.slice(0, 500));
  }
}
