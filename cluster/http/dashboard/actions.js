// Ops actions: drain, recall, clear, pin. Each says what it will do and asks once; the gateway asks for the ops role and the token.

import { el, say } from "./dom.js";
import { plural } from "./format.js";

const MEMBER = {
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
    about: (w) => `${plural(w.idle, "idle cached block")}, pinned ones too, and the host frames that no job needs are dropped. Redis keeps its copies. What was cached is computed or fetched again.`,
  },
};

const PIN_S = 600;
const JOB = {
  pin: {
    name: "Pin", title: (id) => `Pin the prompt of ${id}?`, term_s: PIN_S,
    about: (job) => `For ${PIN_S / 60} minutes, what lies of its prompt on ${job.worker} is evicted after all other idle blocks there. Running jobs still get their room, and at most half of a vault is pinned.`,
  },
  unpin: {
    name: "End pin", title: (id) => `End the pin of ${id}?`, term_s: 0,
    about: (job) => `What lies of its prompt on ${job.worker} is evicted as any other cache again, also where another pinned prompt shares it.`,
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

  ofMember(id) {
    let worker = null;
    const made = this.buttons(MEMBER, ({ title, about }, action) =>
      ({ of: id, title: title(id), about: about(worker), url: `/v1/ops/members/${encodeURIComponent(id)}/${action}` }));
    const node = el("div", { class: "actions" }, Object.values(made));
    return {
      node,
      update: (now, allowed) => {
        worker = now;
        node.hidden = !worker || !allowed || worker.shard > 0;
        if (!worker) return;
        made.drain.hidden = worker.draining;
        made.undrain.hidden = !worker.draining;
        for (const button of Object.values(made)) button.disabled = worker.state === "silent";
        made.recall.disabled = worker.state === "silent" || !worker.lent;
      },
    };
  }

  ofJob(id) {
    let job = null;
    const made = this.buttons(JOB, ({ title, about, term_s }) =>
      ({ of: job.name, title: title(job.name), about: about(job), url: `/v1/ops/jobs/${encodeURIComponent(id)}/pin?term_s=${term_s}` }));
    const node = el("div", { class: "actions", hidden: true }, Object.values(made));
    return { node, update: (now, allowed) => { job = now; node.hidden = !allowed || !job.worker; } };
  }

  buttons(actions, wish) {
    return Object.fromEntries(Object.entries(actions).map(([action, about]) =>
      [action, el("button", { type: "button", "data-action": action, text: about.name, onclick: () => this.ask(about.name, wish(about, action)) })]));
  }

  ask(name, { of, title, about, url }) {
    Object.assign(this, { of, url });
    say(this.heading, title);
    say(this.about, about);
    say(this.problem, "");
    say(this.confirm, name);
    this.confirm.disabled = false;
    this.dialog.showModal();
    this.cancel.focus();
  }

  async act() {
    this.confirm.disabled = true;
    const { ok, body } = await this.post(this.url);
    if (ok) {
      this.dialog.close();
      this.polite(`${this.of}: ${body.outcome}`);
    } else {
      say(this.problem, body ? body.error.message : "The gateway did not answer; nothing may have been done.");
      this.confirm.disabled = false;
    }
  }
}
