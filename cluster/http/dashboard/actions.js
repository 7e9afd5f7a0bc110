// Ops actions: drain, recall, clear. Each says what it will do and asks once; the gateway asks for the ops role and the token.

import { el, say } from "./dom.js";
import { plural } from "./format.js";

const ACTIONS = {
  drain: {
    name: "Drain", title: (id) => `Drain ${id}?`,
    about: (w) => `${w.id} takes no new jobs and grants no new loans. Its ${plural(w.lent, "lent block")} are called back calmly; running jobs go on to their end.`,
  },
  undrain: { name: "End drain", title: (id) => `Let ${id} work again?`, about: (w) => `${w.id} takes jobs and lends again.` },
  recall: {
    name: "Recall loans", title: (id) => `Recall the loans of ${id}?`,
    about: (w) => `${plural(w.lent, "lent block")} are called home. Borrowers move them elsewhere or compute them again: jobs get slower, never wrong. New loans stay possible.`,
  },
  clear: {
    name: "Clear caches", title: (id) => `Clear the caches of ${id}?`,
    about: (w) => `${plural(w.idle, "idle cached block")} and the host frames that no job needs are dropped. Redis keeps its copies. What was cached is computed or fetched again.`,
  },
};

export class Actions {
  constructor(post, polite) {
    Object.assign(this, { post, polite });
    this.heading = el("h2", { id: "ask-title" });
    this.about = el("p", { id: "ask-about" });
    this.problem = el("p", { class: "problem", role: "alert" });
    this.cancel = el("button", { type: "button", text: "Cancel", onclick: () => this.dialog.close() });
    this.confirm = el("button", { type: "button", class: "primary", onclick: () => this.act() });
    this.dialog = el("dialog", { "aria-labelledby": "ask-title", "aria-describedby": "ask-about" }, this.heading, this.about, this.problem,
      el("div", { class: "dialog-end" }, this.cancel, this.confirm));
    document.body.append(this.dialog);
  }

  buttons(id) {
    const made = Object.fromEntries(Object.entries(ACTIONS).map(([action, { name }]) =>
      [action, el("button", { type: "button", "data-action": action, text: name, onclick: () => this.ask(action) })]));
    const node = el("div", { class: "actions" }, Object.values(made));
    return {
      node,
      update: (worker, allowed) => {
        this.worker = worker;
        node.hidden = !worker || !allowed || worker.shard > 0;
        if (!worker) return;
        made.drain.hidden = worker.draining;
        made.undrain.hidden = !worker.draining;
        for (const button of Object.values(made)) button.disabled = worker.state === "silent";
        made.recall.disabled = worker.state === "silent" || !worker.lent;
      },
    };
  }

  ask(action) {
    const { name, title, about } = ACTIONS[action];
    Object.assign(this, { action, member: this.worker.id });
    say(this.heading, title(this.member));
    say(this.about, about(this.worker));
    say(this.problem, "");
    say(this.confirm, name);
    this.confirm.disabled = false;
    this.dialog.showModal();
    this.cancel.focus();
  }

  async act() {
    this.confirm.disabled = true;
    const { ok, body } = await this.post(`/v1/ops/members/${encodeURIComponent(this.member)}/${this.action}`);
    if (ok) {
      this.dialog.close();
      this.polite(`${this.member}: ${body.outcome}`);
    } else {
      say(this.problem, body ? body.error.message : "The gateway did not answer; nothing may have been done.");
      this.confirm.disabled = false;
    }
  }
}
