// What is known of the cluster now: one snapshot, and every change since. Bounded like the gateway's own rings.

const SERIES = 300;
const EVENTS = 1200;
const AUDIT = 200;

export class Cluster {
  constructor() {
    this.clear();
  }

  clear() {
    Object.assign(this, { known: false, at: 0, every_s: 1, facts: {}, tiers: [], window: null, audit: [], events: [], series: [] });
    this.workers = new Map();
    this.loans = new Map();
    this.jobs = new Map();
    this.lastEvent = 0;
    this.news = [];
  }

  apply(name, message) {
    this.news = [];
    if (name === "snapshot") this.begin(message);
    else if (name === "delta" && this.known) this.change(message);
  }

  begin(message) {
    const before = this.lastEvent;
    this.clear();
    Object.assign(this, {
      known: true, at: message.at, every_s: message.every_s, facts: message.facts, tiers: message.tiers,
      window: message.window, audit: message.audit, series: message.series, events: message.events,
    });
    for (const list of ["workers", "loans", "jobs"]) {
      for (const item of message[list]) this[list].set(item.id, item);
    }
    if (message.events.length) this.lastEvent = message.events[message.events.length - 1].number;
    if (before) this.news = message.events.filter((event) => event.number > before);
  }

  change(message) {
    Object.assign(this, { at: message.at, tiers: message.tiers, window: message.window });
    for (const list of ["workers", "loans", "jobs"]) {
      for (const item of message[list].set) this[list].set(item.id, item);
      for (const id of message[list].gone) this[list].delete(id);
    }
    this.series.push(message.point);
    if (this.series.length > SERIES) this.series.shift();
    this.news = message.events.filter((event) => event.number > this.lastEvent);
    this.events.push(...this.news);
    if (this.events.length > EVENTS) this.events.splice(0, this.events.length - EVENTS);
    if (this.news.length) this.lastEvent = this.news[this.news.length - 1].number;
    for (const entry of message.audit) {
      if (!this.audit.some((known) => known.at === entry.at)) this.audit.push(entry);
    }
    if (this.audit.length > AUDIT) this.audit.splice(0, this.audit.length - AUDIT);
  }

  // Members in an order that never jumps: replicas with their shards, then lenders, each by number.
  members() {
    return [...this.workers.values()].sort((a, b) =>
      (a.kind === "model" ? 0 : 1) - (b.kind === "model" ? 0 : 1) || a.replica - b.replica || a.shard - b.shard
      || a.id.localeCompare(b.id, "en", { numeric: true }));
  }

  totals() {
    const sum = { members: 0, silent: 0, draining: 0, total: 0, used: 0, lent: 0, idle: 0, borrowed: 0 };
    for (const worker of this.workers.values()) {
      sum.members += 1;
      if (worker.state === "silent") { sum.silent += 1; continue; }
      if (worker.draining) sum.draining += 1;
      for (const name of ["total", "used", "lent", "idle", "borrowed"]) sum[name] += worker[name];
    }
    return sum;
  }

  // Loans put together by lender and borrower, largest first.
  flows() {
    const pairs = new Map();
    for (const loan of this.loans.values()) {
      const name = `${loan.lender}\n${loan.borrower}`;
      const pair = pairs.get(name) || { name, lender: loan.lender, borrower: loan.borrower, blocks: 0, recalled: 0, loans: 0, term_s: 0 };
      pair.blocks += loan.blocks;
      pair.recalled += loan.recalled;
      pair.loans += 1;
      pair.term_s = Math.max(pair.term_s, loan.term_s);
      pairs.set(name, pair);
    }
    return [...pairs.values()].sort((a, b) => b.blocks - a.blocks || a.name.localeCompare(b.name));
  }

  jobRows() {
    return [...this.jobs.values()].sort((a, b) => b.created - a.created);
  }
}

export const isOver = (job) => job.total_s !== null;
