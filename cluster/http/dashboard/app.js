// The page: signs in, keeps the feed, chooses the view by the address, and says how fresh everything is.

import { Actions } from "./actions.js";
import { Cluster } from "./cluster.js";
import { el, say, set } from "./dom.js";
import { Events } from "./events.js";
import { clock } from "./format.js";
import { Job } from "./job.js";
import { Jobs } from "./jobs.js";
import { Loans } from "./loans.js";
import { Member } from "./member.js";
import { Members } from "./members.js";
import { Overview } from "./overview.js";
import { Stream } from "./stream.js";

const KEY = "kvbank-key";
const [main, banner, link, polite] = ["main", "banner", "link", "polite"].map((id) => document.getElementById(id));
const cluster = new Cluster();
const renders = [];                     // milliseconds of main thread that each update took, the last 100
let stream = null;
let view = null;
let csrf = "";
let due = 0;                            // the frame that will draw
let fault = "";                         // what went wrong in this page itself, until a drawing went well

// -- asking the gateway ------------------------------------------------------------------------------------------------

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function ask(url, options = {}) {
  try {
    const answer = await fetch(url, { ...options, headers: { ...headers(), ...options.headers }, cache: "no-store", signal: AbortSignal.timeout(10000) });
    return { ok: answer.ok, status: answer.status, body: await answer.json() };
  } catch (_error) {
    return { ok: false, status: 0, body: null };
  }
}

async function post(url) {
  if (!csrf) csrf = (await ask("/v1/ops/session")).body?.csrf || "";
  const answer = await ask(url, { method: "POST", headers: { "x-kvbank-csrf": csrf } });
  if (answer.status !== 403) return answer;
  csrf = (await ask("/v1/ops/session")).body?.csrf || "";        // the gateway was started again, and has another one
  return csrf ? ask(url, { method: "POST", headers: { "x-kvbank-csrf": csrf } }) : answer;
}

// -- views -------------------------------------------------------------------------------------------------------------

function decoded(name) {
  try {
    return decodeURIComponent(name);
  } catch (_error) {
    return name;                                                   // typed by hand: it names nobody
  }
}

function chosen() {
  const [, page = "", name = ""] = location.hash.split("/");
  const id = decoded(name);
  switch (page) {
    case "": return new Overview();
    case "members": return new Members();
    case "member": return new Member(id, ask, actions);
    case "loans": return new Loans();
    case "jobs": return new Jobs();
    case "job": return new Job(id, ask, actions);
    case "events": return new Events();
    default: return { title: "No such page", node: el("p", { class: "empty", text: "There is no such page." }), update() {} };
  }
}

function show(moveFocus) {
  if (!cluster.known) return;
  view = chosen();
  main.replaceChildren(view.node);
  const here = `#/${location.hash.split("/")[1] || ""}`.replace(/^#\/(member|job)$/, "#/$1s");
  for (const anchor of document.querySelectorAll("#nav a")) set(anchor, "aria-current", anchor.getAttribute("href") === here ? "page" : null);
  render();
  if (moveFocus) { main.focus(); window.scrollTo(0, 0); }
}

// Once a frame, however much came since the last one.
function renderSoon() {
  due ||= requestAnimationFrame(() => { due = 0; render(); });
}

function render() {
  if (!view || document.hidden) return;
  const began = performance.now();
  draw(view).then(() => judge(null), judge);
  renders.push(performance.now() - began);
  if (renders.length > 100) renders.shift();
}

// Ends when all is drawn: some views ask the gateway for more.
async function draw(drawn) {
  const rest = drawn.update(cluster);
  say(document.querySelector("title"), `${drawn.title} · kvbank`);
  await rest;
}

// A fault of this page is told and logged as one. The connection is another matter, and stays.
function judge(error) {
  const text = error ? String(error) : "";
  if (text === fault) return;
  fault = text;
  if (error) console.error(error);
  if (stream) onState(stream.state);
}

// -- the feed ----------------------------------------------------------------------------------------------------------

function onMessage(name, message) {
  cluster.apply(name, message);
  say(document.getElementById("model"), cluster.facts.model || "");
  if (name === "snapshot" && !view) show(false);
  else renderSoon();
  const grave = cluster.news.filter((event) => event.level === "bad");
  if (grave.length) say(polite, grave.map((event) => event.text).join(". "));
}

function onState(state, detail, changed) {
  const age = stream ? Math.round((performance.now() - stream.heard) / 1000) : 0;
  const words = { connecting: "Connecting", live: "Live", stale: `No news for ${age} s`, lost: "Disconnected", denied: "Not allowed" };
  set(link, "data-state", state);
  say(link, words[state]);
  document.body.classList.toggle("old", cluster.known && (state === "stale" || state === "lost" || Boolean(fault)));
  if (state === "lost" && cluster.known) {
    const left = Math.max(0, Math.ceil((stream.retryAt - performance.now()) / 1000));
    tell(`The gateway cannot be reached. What you see is from ${clock(cluster.at)}.`, left ? `Trying again in ${left} s.` : "Trying now.", () => stream.now());
  } else if (state === "lost") tell("The gateway cannot be reached.", "Trying again.", () => stream.now());
  else if (state === "stale") tell(`The gateway has said nothing since ${clock(cluster.at)}.`, "What you see may be old.");
  else if (state === "denied" && changed) denied(detail);
  else if (state !== "denied") tell(fault && "This page failed to draw what the gateway told it. What you see may be old or wrong.", fault);
}

function tell(text, more, retry) {
  if (!text) { if (banner.firstChild) banner.replaceChildren(); return; }
  if (banner.dataset.text !== text || !banner.firstChild) {
    banner.dataset.text = text;
    banner.replaceChildren(el("p", {}, el("b", { text }), " ", el("span", { "aria-live": "off" })),
      retry ? el("button", { type: "button", text: "Try now", onclick: retry }) : "");
  }
  say(banner.querySelector("span"), more || "");
}

function begin() {
  document.getElementById("sign-out").hidden = !sessionStorage.getItem(KEY);
  stream = new Stream("/v1/ops/feed", { headers, onMessage, onState, onFault: judge });
}

// -- signing in --------------------------------------------------------------------------------------------------------

function forget() {
  if (stream) stream.stop();
  stream = null;
  view = null;
  csrf = "";
  fault = "";
  cluster.clear();
  sessionStorage.removeItem(KEY);
  document.getElementById("sign-out").hidden = true;
}

function denied(status) {
  forget();
  signIn(status === 403 ? "This key may send jobs and not run the cluster. A key with the role ops is needed." : "This key is not valid here.");
}

function signIn(problem = "") {
  set(link, "data-state", "denied");
  say(link, "Signed out");
  tell("");
  const key = el("input", { id: "key", type: "password", autocomplete: "off", required: true, "aria-describedby": "key-about key-problem" });
  const form = el("form", { class: "card sign-in" }, el("h1", { text: "Sign in" }),
    el("p", { id: "key-about", class: "about", text: "With an API key that has the role ops. It stays in this tab and is forgotten when you close it." }),
    el("label", { for: "key", text: "API key" }), key, el("p", { id: "key-problem", class: "problem", role: "alert", text: problem }),
    el("button", { class: "primary", text: "Sign in" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, key.value.trim());
    main.replaceChildren(el("p", { class: "empty", text: "Loading" }));
    begin();
  });
  main.replaceChildren(form);
  key.focus();
}

// -- the frame ---------------------------------------------------------------------------------------------------------

function themes() {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const names = ["auto", "light", "dark"];
  const tellTheme = () => say(button, `Theme: ${root.dataset.theme || "auto"}`);
  button.addEventListener("click", () => {
    const next = names[(names.indexOf(root.dataset.theme || "auto") + 1) % names.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    try { localStorage.setItem("kvbank-theme", next); } catch (_error) { /* not kept, then */ }
    tellTheme();
  });
  tellTheme();
}

const actions = new Actions(post, (text) => say(polite, text));
themes();
window.addEventListener("hashchange", () => show(true));
document.addEventListener("visibilitychange", render);
document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
document.getElementById("sign-out").addEventListener("click", () => { forget(); signIn(); });
window.kvbank = { renders, cluster, stream: () => stream };

const door = await ask("/dashboard/door");
if (door.ok && door.body.sign_in && !sessionStorage.getItem(KEY)) signIn();
else begin();
