// The feed, read with fetch: an EventSource cannot send a key. Connects again by itself, a little later each time.
//
//     connecting -> live -> stale (no word for STALE_MS) -> live
//                     \-> lost (the stream broke) -> connecting ...        denied: the key does not open this door
//
// What a listener throws is a fault of the page: it goes to onFault, and is no reason to connect again.

const STALE_MS = 4000;
const SILENT_MS = 15000;
const WAITS_MS = [500, 1000, 2000, 4000, 8000];

export class Stream {
  constructor(url, { headers, onMessage, onState, onFault }) {
    Object.assign(this, { url, headers, onMessage, onState, onFault });
    this.state = "connecting";
    this.heard = 0;
    this.tries = 0;
    this.retryAt = 0;
    this.ticker = setInterval(() => this.tick(), 500);
    this.connect();
  }

  stop() {
    this.stopped = true;
    clearInterval(this.ticker);
    clearTimeout(this.timer);
    if (this.abort) this.abort.abort();
  }

  now() {
    clearTimeout(this.timer);
    if (this.abort) this.abort.abort();
    this.connect();
  }

  become(state, detail) {
    const changed = state !== this.state;
    this.state = state;
    this.tell(this.onState, state, detail, changed);
  }

  tell(listener, ...said) {
    try {
      listener(...said);
    } catch (error) {
      this.onFault(error);
    }
  }

  tick() {
    const quiet = performance.now() - this.heard;
    if (this.state === "live" && quiet > STALE_MS) this.become("stale");
    else if (this.state === "stale" && quiet > SILENT_MS && this.abort) this.abort.abort();
    else this.tell(this.onState, this.state, undefined, false);
  }

  async connect() {
    const abort = (this.abort = new AbortController());
    if (this.state !== "live") this.become(this.state === "lost" ? "lost" : "connecting");
    const silence = setTimeout(() => abort.abort(), SILENT_MS);
    try {
      const answer = await fetch(this.url, { headers: this.headers(), signal: abort.signal, cache: "no-store" });
      if (answer.status === 401 || answer.status === 403) {
        this.become("denied", answer.status);
        return;
      }
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      await this.read(answer.body.getReader(), silence);
    } catch (_error) { /* the network's reasons, or words that are none; what matters is that it is lost */ }
    clearTimeout(silence);
    if (this.stopped || this.abort !== abort) return;
    const wait = WAITS_MS[Math.min(this.tries, WAITS_MS.length - 1)];
    this.tries += 1;
    this.retryAt = performance.now() + wait;
    this.become("lost");
    this.timer = setTimeout(() => this.connect(), wait);
  }

  async read(reader, silence) {
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done || this.stopped) return;
      clearTimeout(silence);
      rest += decoder.decode(value, { stream: true });
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) this.take(part);
    }
  }

  take(part) {
    let name = "message";
    const data = [];
    for (const line of part.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      else if (line.startsWith("data: ")) data.push(line.slice(6));
    }
    this.heard = performance.now();
    this.tries = 0;
    if (data.length) {
      if (this.state !== "live") this.become("live");
      this.tell(this.onMessage, name, JSON.parse(data.join("\n")));
    }
  }
}
