// All members in one table.

import { card, chip, el, keyed, say, set, table } from "./dom.js";
import { NONE, bytes, count, plural } from "./format.js";
import { Bar, condition, legend, longest } from "./vault.js";

const COLUMNS = [{ name: "Member" }, { name: "State" }, { name: "Host" }, { name: "Process", number: true }, { name: "Vault" },
  { name: "Blocks", number: true }, { name: "In use", number: true }, { name: "Lent", number: true }, { name: "Cached", number: true },
  { name: "Borrowed", number: true }, { name: "Host tier", number: true }, { name: "Recalls", number: true }];

export class Members {
  constructor() {
    this.title = "Members";
    this.word = el("input", { id: "member-word", type: "search", autocomplete: "off", oninput: () => this.update(this.cluster) });
    this.table = table("Members", COLUMNS);
    this.empty = el("p", { class: "empty" });
    this.card = card("Members", "", el("div", { class: "filters" }, el("label", { for: "member-word", text: "Name, host or state" }), this.word, legend()), this.table.node, this.empty);
    this.node = el("div", { class: "page" }, el("h1", { class: "unseen", text: "Members" }), this.card.node);
  }

  update(cluster) {
    this.cluster = cluster;
    const word = this.word.value.trim().toLowerCase();
    const members = cluster.members().filter((w) => !word || `${w.id} ${w.host} ${condition(w)} ${w.kind}`.toLowerCase().includes(word));
    say(this.card.note, `${plural(members.length, "member")} of ${count(cluster.workers.size)}; counts are blocks, now; recalls since the member started`);
    this.empty.hidden = members.length > 0;
    this.table.node.hidden = !members.length;
    say(this.empty, cluster.workers.size ? "No member fits this filter." : "No member is known yet.");
    const scale = longest(members);
    keyed(this.table.body, members, (w) => w.id, make, (row, w) => tell(row, w, scale));
  }
}

function make(worker) {
  const cells = COLUMNS.map((c) => el("td", { class: c.number ? "number" : null }));
  const bar = new Bar();
  const state = chip("ok");
  cells[0].append(el("a", { href: `#/member/${encodeURIComponent(worker.id)}`, text: worker.id }));
  cells[1].append(state);
  cells[4].append(bar.node);
  const row = el("tr", {}, cells);
  row.parts = { cells, bar, state };
  return row;
}

function tell(row, worker, scale) {
  if (row.worker === worker && row.scale === scale) return;
  Object.assign(row, { worker, scale });
  const { cells, bar, state } = row.parts;
  const now = condition(worker);
  set(state, "data-state", now);
  say(state, now === "ok" ? worker.kind : now);
  bar.update(worker, scale);
  const host = worker.tiers.find((tier) => tier.name === "host");
  const told = { 2: worker.host, 3: worker.pid || NONE, 5: count(worker.total), 6: count(worker.used), 7: count(worker.lent),
    8: count(worker.idle), 9: count(worker.borrowed), 10: host ? bytes(host.bytes_used) : NONE, 11: count(worker.recalls) };
  for (const [at, value] of Object.entries(told)) say(cells[at], value);
}
