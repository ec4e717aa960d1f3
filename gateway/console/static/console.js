"use strict";
// Curves by uPlot, followed by server-sent events; a chat; tokens by the arrow keys. All else is HTML and htmx.

const root = document.documentElement;
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const NOT_DRAWN = new Set(["step", "at", "tokens", "wall_seconds"]);
const FIRST = ["loss/mean", "reward/mean", "kl/mean", "grad_norm", "learning_rate", "staleness", "tokens/second"];

function digits(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(+value.toPrecision(4));
}

function names(points, only) {
  const found = new Set();
  for (const point of points) {
    for (const [name, value] of Object.entries(point)) {
      if (typeof value === "number" && !NOT_DRAWN.has(name) && (!only || name === only)) found.add(name);
    }
  }
  const rank = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  return [...found].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b)).slice(0, 24);
}

function options(width, height, lines) {
  const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  const series = lines.map((line, n) => ({
    label: line, stroke: colour(`--c${n}`), width: 1.5, spanGaps: true, points: { show: (u, at) => u.data[at].filter((v) => v !== null).length < 2 },
  }));
  return {
    width, height, scales: { x: { time: false }, y: { range: span } }, legend: { show: false }, cursor: { drag: { x: true, y: false } },
    axes: [{ ...axis, size: 24, space: 60, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick : "")) }, { ...axis, size: 58, space: 26, values: (_, ticks) => ticks.map(digits) }],
    series: [{}, ...series],
  };
}

// A line that does not change is in the middle, with its own value beside it.
function span(_, low, high) {
  if (low === null || high === null) return [0, 1];
  const room = low === high ? Math.abs(low) || 1 : 0.08 * (high - low);
  return [low - room, high + room];
}

// ---- the curves of one run or job

function numbers(points, metrics) {
  const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  for (const name of ["step", ...metrics]) {
    const cell = document.createElement("th");
    cell.scope = "col"; cell.className = "n"; cell.textContent = name;
    head.append(cell);
  }
  for (const point of points.slice(-200).reverse()) {
    const row = body.insertRow();
    for (const name of ["step", ...metrics]) {
      const cell = row.insertCell();
      cell.className = "n"; cell.textContent = digits(point[name]);
    }
  }
  return table;
}

class Curves {
  constructor(section) {
    this.section = section;
    this.plots = new Map();
    this.points = [];
    this.status = section.querySelector("[data-status]");
  }

  async read() {
    const answer = await fetch(this.section.dataset.source);
    if (!answer.ok) { this.status.textContent = `The curve cannot be read (${answer.status}).`; return; }
    this.points = (await answer.json()).points;
    this.draw();
  }

  add(points) {
    const last = this.points.length ? this.points[this.points.length - 1].step : 0;
    this.points.push(...points.filter((point) => point.step > last));
    this.draw();
  }

  draw() {
    const metrics = names(this.points, this.section.dataset.only);
    const steps = this.points.length ? `${this.points.length} steps` : "No steps yet, or none that are still kept.";
    this.status.textContent = this.following ? `${steps} · following` : steps;
    const x = this.points.map((point) => point.step);
    for (const name of metrics) {
      const data = [x, this.points.map((point) => point[name] ?? null)];
      const known = this.plots.get(name) ?? this.make(name, data);
      known.last.textContent = digits(this.points[this.points.length - 1][name]);
      known.plot.setData(data);
    }
    this.section.querySelector(".numbers").replaceChildren(...(metrics.length ? [numbers(this.points, metrics)] : []));
  }

  make(name, data) {
    const box = document.createElement("div"), title = document.createElement("h3"), last = document.createElement("span");
    box.className = "plot"; title.append(name, last); box.append(title);
    this.section.querySelector(".plots").append(box);
    const known = { box, last, plot: new uPlot(options(box.clientWidth, 130, [name]), data, box) };
    known.plot.root.setAttribute("aria-hidden", "true"); // the same numbers are in the table below
    this.plots.set(name, known);
    return known;
  }

  restyle() {
    for (const { box } of this.plots.values()) box.remove();
    this.plots.clear();
    if (this.points.length) this.draw();
  }

  // A hidden page is not followed; the server ends streams of what does not change any more.
  follow() {
    if (!this.section.dataset.live || this.stream || document.hidden) return;
    this.stream = new EventSource(this.section.dataset.live);
    this.stream.addEventListener("open", () => { this.following = true; this.read(); });
    this.stream.addEventListener("news", (event) => {
      this.add(JSON.parse(event.data).points ?? []);
      document.body.dispatchEvent(new CustomEvent("news"));
    });
    this.stream.addEventListener("end", () => this.leave());
    this.stream.addEventListener("error", () => this.leave());
  }

  leave() {
    this.stream?.close();
    this.stream = null;
    this.following = false;
    this.draw();
  }
}

// ---- several on one chart

class Comparison {
  constructor(section) {
    this.section = section;
    this.rows = [...section.querySelectorAll("tr[data-source]")];
    this.select = section.querySelector("select");
    this.status = section.querySelector("[data-status]");
    this.select.addEventListener("change", () => this.draw());
  }

  async read() {
    const answers = await Promise.all(this.rows.map((row) => fetch(row.dataset.source)));
    this.series = await Promise.all(answers.map(async (answer) => (answer.ok ? (await answer.json()).points : [])));
    const all = [...new Set(this.series.flatMap((points) => names(points)))];
    const rank = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
    for (const name of all.sort((a, b) => rank(a) - rank(b))) this.select.append(new Option(name, name));
    this.status.textContent = all.length ? "" : "None of them has steps that are still kept.";
    this.draw();
  }

  draw() {
    const metric = this.select.value, box = this.section.querySelector(".plots");
    box.replaceChildren();
    if (!metric) return;
    const tables = this.series.map((points) => [points.map((point) => point.step), points.map((point) => point[metric] ?? null)]);
    const lines = this.rows.map((_, n) => `${metric} ${n + 1}`);
    const plot = new uPlot(options(box.clientWidth, 300, lines), uPlot.join(tables), box);
    plot.root.setAttribute("aria-hidden", "true");
    this.rows.forEach((row, n) => {
      const values = tables[n][1].filter((value) => value !== null);
      row.querySelector("[data-last]").textContent = digits(values[values.length - 1]);
    });
  }

  restyle() { if (this.series) this.draw(); }
}

// ---- tokens

function tokens(box) {
  const cells = [...box.querySelectorAll(".t")], told = document.getElementById("token");
  let now = -1;
  const show = (n) => {
    if (n < 0 || n >= cells.length) return;
    cells[now]?.classList.remove("now");
    now = n;
    const { n: position, id, lp, by, adv } = cells[n].dataset;
    cells[n].classList.add("now");
    cells[n].scrollIntoView({ block: "nearest" });
    told.textContent = `token ${position}: “${cells[n].textContent}”, id ${id}, log-probability ${lp}, probability ${(100 * Math.exp(Math.min(0, lp))).toFixed(2)} %`
      + (by ? `; by the sampler ${by}, difference ${digits(lp - by)}` : "") + (adv ? `; advantage ${adv}` : "");
  };
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (step) { event.preventDefault(); show(Math.max(0, Math.min(cells.length - 1, now + step))); }
  });
  box.addEventListener("pointerover", (event) => show(cells.indexOf(event.target)));
  for (const radio of document.querySelectorAll("input[name=heat]")) {
    radio.addEventListener("change", () => {
      box.dataset.heat = radio.value;
      for (const legend of document.querySelectorAll("[data-for]")) legend.hidden = legend.dataset.for !== radio.value;
    });
  }
}

// ---- the chat

class Talk {
  constructor(list, side) { this.list = list; this.side = side; this.messages = []; }

  say(role, text) {
    const item = document.createElement("li");
    item.className = role; item.textContent = text;
    this.list.append(item);
    return item;
  }

  async send(form, words) {
    this.messages.push({ role: "user", content: words });
    this.say("user", words);
    const item = this.say("assistant", "");
    const body = {
      model: form.elements[this.side].value, messages: this.messages, stream: true, seed: +form.elements.seed.value,
      temperature: +form.elements.temperature.value, max_tokens: +form.elements.tokens.value,
    };
    try {
      await this.stream(body, item);
      this.messages.push({ role: "assistant", content: item.textContent });
    } catch (error) {
      item.className = "failed"; item.textContent = error.message;
      this.messages.pop();
    }
  }

  async stream(body, item) {
    const headers = { "Content-Type": "application/json", "X-CSRF-Token": document.body.dataset.csrf };
    const answer = await fetch("/playground/chat", { method: "POST", headers, body: JSON.stringify(body) });
    if (!answer.ok) {
      const told = await answer.json().catch(() => ({}));
      throw new Error(told.error?.message ?? told.detail ?? `refused (${answer.status})`);
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith(": ") && !item.textContent) item.dataset.waits = line.slice(2);
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        item.textContent += event.choices[0]?.delta?.content ?? "";
      }
    }
  }
}

function chat(form) {
  const talks = [...document.querySelectorAll(".talk")].map((list) => new Talk(list, list.dataset.side));
  const button = form.querySelector("button");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const words = form.elements.words.value;
    button.disabled = true;
    await Promise.all(talks.map((talk) => talk.send(form, words)));
    button.disabled = false;
    form.elements.words.value = "";
    form.elements.words.focus();
  });
  document.getElementById("anew").addEventListener("click", () => {
    for (const talk of talks) { talk.messages = []; talk.list.replaceChildren(); }
  });
}

const drawn = [];
for (const section of document.querySelectorAll(".chart")) {
  const curves = new Curves(section);
  drawn.push(curves);
  curves.read().then(() => curves.follow());
  document.addEventListener("visibilitychange", () => (document.hidden ? curves.leave() : curves.follow()));
}
for (const section of document.querySelectorAll(".compare")) {
  const comparison = new Comparison(section);
  drawn.push(comparison);
  comparison.read();
}
for (const box of document.querySelectorAll(".tokens")) tokens(box);
for (const form of document.querySelectorAll("#chat")) chat(form);
const restyle = () => drawn.forEach((each) => each.restyle());
dark.addEventListener("change", restyle);
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; restyle(); } });
