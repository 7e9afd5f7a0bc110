// One member: its vault, its shelves, its loans and jobs, what it counts, and what may be done to it.

import { card, chip, el, keyed, say, set, table } from "./dom.js";
import { NONE, count, seconds } from "./format.js";
import { facts } from "./job.js";
import { BRIEF, jobTable } from "./jobs.js";
import { makeTier, tellTier } from "./overview.js";
import { words } from "./shares.js";
import { Bar, condition, legend } from "./vault.js";

export class Member {
  constructor(id, ask, actions) {
    Object.assign(this, { id, ask, title: `Member ${id}` });
    this.state = chip("ok", "loading");
    this.facts = el("dl", { class: "facts" });
    this.bar = new Bar();
    this.numbers = el("dl", { class: "facts" });
    this.tiers = el("ul", { class: "tiers" });
    this.noTiers = el("p", { class: "empty", text: "This member has no shelf below its device." });
    this.loans = table("Loans of this member", [{ name: "Direction" }, { name: "Other member" }, { name: "Blocks", number: true }, { name: "Recalled, blocks", number: true }, { name: "Term", number: true }]);
    this.noLoans = el("p", { class: "empty", text: "It neither lends nor borrows now." });
    this.jobs = jobTable("Jobs on this member", BRIEF);
    this.noJobs = el("p", { class: "empty", text: "No job runs here now." });
    this.counters = el("dl", { class: "counters" });
    this.buttons = actions.ofMember(id);
    this.gone = el("p", { class: "empty", text: "No member of this name is there now." });
    this.rest = el("div", {},
      el("div", { class: "two" }, card("Vault", "blocks by state, now", legend(), this.bar.node, this.numbers).node,
        card("Shelves below the device", "bytes, now", this.tiers, this.noTiers).node),
      el("div", { class: "two" }, card("Jobs", "running and waiting here, now", this.jobs.node, this.noJobs).node,
        card("Loans", "now", this.loans.node, this.noLoans).node),
      card("Counters", "since this process started; seconds where the name ends with s, bytes where it says so", this.counters).node);
    this.node = el("div", { class: "page" }, el("p", { class: "crumbs" }, el("a", { href: "#/members", text: "Members" })),
      el("div", { class: "title" }, el("h1", { text: id }), this.state, this.buttons.node), this.facts, this.gone, this.rest);
  }

  update(cluster) {
    const worker = cluster.workers.get(this.id);
    this.gone.hidden = Boolean(worker);
    this.rest.hidden = !worker;
    this.buttons.update(worker, cluster.facts.actions);
    if (!worker) { set(this.state, "data-state", "silent"); say(this.state, "gone"); return null; }
    const now = condition(worker);
    set(this.state, "data-state", now);
    say(this.state, now === "ok" ? "answers" : now);
    facts(this.facts, [["Kind", worker.kind], ["Replica", worker.kind === "model" ? `${worker.replica}, shard ${worker.shard}` : NONE], ["Host", worker.host], ["Process", String(worker.pid || NONE)]]);
    this.bar.update(worker);
    facts(this.numbers, [["Blocks", count(worker.total)], ["In use", count(worker.used)], ["Lent", count(worker.lent)], ["Cached", count(worker.idle)],
      ["Blank", count(worker.free - worker.idle)], ["Borrowed elsewhere", count(worker.borrowed)], ["Recalls since its start", count(worker.recalls)]]);
    const jobs = cluster.jobRows().filter((job) => job.worker === this.id && job.total_s === null);
    this.noJobs.hidden = jobs.length > 0;
    this.jobs.node.hidden = !jobs.length;
    this.jobs.update(jobs.slice(0, 100));
    const loans = [...cluster.loans.values()].filter((loan) => loan.lender === this.id || loan.borrower === this.id);
    this.noLoans.hidden = loans.length > 0;
    this.loans.node.hidden = !loans.length;
    keyed(this.loans.body, loans, (loan) => loan.id, (loan) => {
      const [lends, other] = loan.lender === this.id ? ["lends to", loan.borrower] : ["borrows from", loan.lender];
      return el("tr", {}, el("td", { text: lends }), el("td", {}, el("a", { href: `#/member/${encodeURIComponent(other)}`, text: other })), [0, 1, 2].map(() => el("td", { class: "number" })));
    }, (row, loan) => [count(loan.blocks), loan.recalled ? count(loan.recalled) : NONE, seconds(loan.term_s)].forEach((value, i) => say(row.children[i + 2], value)));
    return this.detail();
  }

  async detail() {
    if (this.asking) return;
    this.asking = true;
    const { ok, body } = await this.ask(`/v1/ops/workers/${encodeURIComponent(this.id)}`);
    this.asking = false;
    if (!ok) return;
    this.noTiers.hidden = body.tiers.length > 0;
    this.tiers.hidden = !body.tiers.length;
    keyed(this.tiers, body.tiers, (tier) => tier.name, makeTier, tellTier);
    const counters = Object.entries(body.counters).sort(([a], [b]) => a.localeCompare(b));
    facts(this.counters, counters.map(([name, value]) => [words(name), name.endsWith("_s") ? seconds(value) : count(value)]));
  }
}

