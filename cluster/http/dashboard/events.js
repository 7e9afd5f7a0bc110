// What happened: the event log with its filter, and the record of ops actions.

import { card, chip, el, keyed, say, set, table } from "./dom.js";
import { clock, count, plural } from "./format.js";

const KINDS = { member: "members", loan: "loans", recall: "recalls", job: "jobs", breaker: "breakers", ops: "ops actions" };
const SHOWN = 300;

export function eventLine(event) {
  const target = event.job ? `#/job/${encodeURIComponent(event.job)}` : event.member ? `#/member/${encodeURIComponent(event.member)}` : null;
  const words = target ? el("a", { href: target, text: event.text }) : el("span", { text: event.text });
  return el("li", { class: "event", "data-level": event.level },
    el("time", { text: clock(event.at), datetime: new Date(event.at * 1000).toISOString() }),
    el("span", { class: "kind", text: event.level === "info" ? event.kind : `${event.kind} !` }), words);
}

export class Events {
  constructor() {
    this.title = "Events";
    this.kinds = Object.entries(KINDS).map(([kind, name]) => {
      const box = el("input", { type: "checkbox", checked: true, onchange: () => this.update(this.cluster) });
      return { kind, box, node: el("label", { class: "check" }, box, name) };
    });
    this.word = el("input", { id: "event-word", type: "search", autocomplete: "off", oninput: () => this.update(this.cluster) });
    this.list = el("ul", { class: "events long" });
    this.empty = el("p", { class: "empty" });
    this.log = card("Events", "", el("div", { class: "filters" }, this.kinds.map((k) => k.node),
      el("label", { for: "event-word", text: "Containing" }), this.word), this.list, this.empty);
    this.audit = table("Ops actions, newest first", [{ name: "At" }, { name: "Who" }, { name: "Tenant" }, { name: "Action" }, { name: "Member" }, { name: "Job" }, { name: "Outcome" }]);
    this.trail = card("Who did what", "ops actions since the gateway started, the last 200", this.audit.node,
      el("p", { class: "empty", text: "Nobody drained, recalled, cleared or pinned anything yet." }));
    this.node = el("div", { class: "page" }, el("h1", { class: "unseen", text: "Events" }), this.log.node, this.trail.node);
  }

  update(cluster) {
    this.cluster = cluster;
    const wanted = new Set(this.kinds.filter((k) => k.box.checked).map((k) => k.kind));
    const word = this.word.value.trim().toLowerCase();
    const fit = cluster.events.filter((e) => wanted.has(e.kind) && (!word || e.text.toLowerCase().includes(word)));
    say(this.log.note, `${plural(fit.length, "event")} of ${count(cluster.events.length)} kept, newest first; members, loans and breakers are watched while a dashboard is open`);
    this.empty.hidden = fit.length > 0;
    say(this.empty, cluster.events.length ? "No event fits this filter." : "Nothing happened yet since the gateway started.");
    keyed(this.list, fit.slice(-SHOWN).reverse(), (e) => e.number, eventLine, () => {});
    const entries = [...cluster.audit].reverse();
    this.audit.node.hidden = !entries.length;
    this.trail.body.lastElementChild.hidden = entries.length > 0;
    keyed(this.audit.body, entries, (e) => e.at, (e) => {
      const outcome = el("td", {}, chip(e.ok ? "ok" : "bad", e.ok ? "done" : "refused"), ` ${e.outcome}`);
      const job = el("td", {}, e.job ? el("a", { href: `#/job/${encodeURIComponent(e.job)}`, text: e.job }) : "");
      return el("tr", {}, [clock(e.at), e.who, e.tenant, e.action, e.member].map((text) => el("td", { text })), job, outcome);
    }, (row) => set(row, "class", null));
  }
}
