// All open loans: the flow, and each one in a row.

import { card, el, keyed, say, table } from "./dom.js";
import { Flow } from "./flow.js";
import { NONE, clock, count, plural, seconds } from "./format.js";

export class Loans {
  constructor() {
    this.title = "Loans";
    this.flow = new Flow();
    this.table = table("Open loans", [{ name: "Lender" }, { name: "Borrower" }, { name: "Blocks", number: true },
      { name: "Recalled, blocks", number: true }, { name: "Term", number: true }, { name: "Opened at", number: true }]);
    this.flows = card("Loans", "blocks from lender to borrower, now", this.flow.node);
    this.list = card("Each loan", "", this.table.node);
    this.node = el("div", { class: "page" }, el("h1", { class: "unseen", text: "Loans" }), this.flows.node, this.list.node);
  }

  update(cluster) {
    this.flow.update(cluster.flows());
    const loans = [...cluster.loans.values()].sort((a, b) => b.blocks - a.blocks || a.id.localeCompare(b.id));
    say(this.list.note, `${plural(loans.length, "open loan")} now; a term is renewed as long as the borrower needs the blocks`);
    this.list.node.hidden = !loans.length;
    const member = (id) => el("td", {}, el("a", { href: `#/member/${encodeURIComponent(id)}`, text: id }));
    keyed(this.table.body, loans.slice(0, 500), (loan) => loan.id,
      (loan) => el("tr", {}, member(loan.lender), member(loan.borrower), [0, 1, 2].map(() => el("td", { class: "number" })),
        el("td", { class: "number", text: clock(loan.opened) })),
      (row, loan) => [count(loan.blocks), loan.recalled ? count(loan.recalled) : NONE, seconds(loan.term_s)]
        .forEach((value, i) => say(row.children[i + 2], value)));
  }
}
