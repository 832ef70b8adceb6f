"use strict";
// Draws /state.json again and again; nothing here changes anything on the server.

const PERIOD = 1000; // milliseconds between requests
const KEPT = 300; // points of a curve
const curves = { ended: [], queued: [], leased: [] };
let before = null;

const element = (id) => document.getElementById(id);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const count = (value) => Math.round(value).toLocaleString("en");

function make(name, content = "", kind = "") {
  const made = document.createElement(name);
  made.append(content);
  if (kind) made.className = kind;
  return made;
}

function age(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= 2 * size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.max(0, Math.round(seconds))} s`;
}

// -- numbers with a curve -----------------------------------------------------------

function keep(values, value) {
  values.push(value);
  if (values.length > KEPT) values.shift();
}

function card(title, value, values = []) {
  const made = make("div", make("b", value), "card");
  made.append(make("span", title));
  if (values.length > 1) {
    const most = Math.max(...values, 1e-9);
    const points = values.map((value, index) => `${(100 * index) / (KEPT - 1)},${38 - (36 * value) / most}`);
    const path = `<path d="M${points.join("L")}"/>`;
    made.insertAdjacentHTML("beforeend", `<svg viewBox="0 0 100 40" preserveAspectRatio="none" aria-hidden="true">${path}</svg>`);
  }
  return made;
}

function drawNumbers(state) {
  const ended = sum(Object.values(state.ended));
  // Two pages, or a slow one, may get the same state twice.
  if (before && state.at > before.at) {
    keep(curves.ended, Math.max(0, ended - before.ended) / (state.at - before.at));
  }
  if (!before || state.at > before.at) before = { ended, at: state.at };
  const queued = sum(state.queues.map((queue) => queue.queued));
  const leased = sum(state.queues.map((queue) => queue.leased));
  keep(curves.queued, queued);
  keep(curves.leased, leased);
  const rate = curves.ended.at(-1) ?? 0;
  const oldest = Math.max(0, ...state.queues.map((queue) => queue.oldest));
  const bad = ["FAILED", "QUARANTINED"].map((name) => count(state.ended[name] || 0));
  element("numbers").replaceChildren(
    card("jobs ended per second", rate >= 10 ? count(rate) : rate.toFixed(1), curves.ended),
    card(`jobs queued, the oldest for ${age(oldest)}`, count(queued), curves.queued),
    card("jobs leased to workers", count(leased), curves.leased),
    card("workers", count(state.workers.length)),
    card("jobs ended in total", count(ended)),
    card("jobs failed, quarantined", bad.join(", ")),
    card("memory of Redis", `${(state.memory / 1e6).toFixed(1)} MB`),
  );
}

// -- tables -------------------------------------------------------------------------

const ENDED = [
  ["ended", "", (job) => `${age(before.at - job.at)} ago`],
  ["state", "", (job) => make("span", job.state.toLowerCase(), job.state === "SUCCEEDED" ? "" : "bad")],
  ["prompt or error", "text", jobText],
  ["model", "", (job) => job.model],
  ["tenant", "", (job) => job.tenant],
  ["worker", "id", (job) => job.worker],
  ["job", "id", (job) => job.job],
];
// Of each table: title, class and content of its columns.
const TABLES = {
  queues: [
    ["model", "", (queue) => queue.model],
    ["tenant", "", (queue) => queue.tenant],
    ["priority", "", (queue) => queue.priority],
    ["queued", "n", (queue) => count(queue.queued)],
    ["leased", "n", (queue) => count(queue.leased)],
    ["oldest", "n", (queue) => (queue.queued ? age(queue.oldest) : "")],
  ],
  workers: [
    ["worker", "id", (worker) => (worker.draining ? `${worker.id} (draining)` : worker.id)],
    ["models", "", (worker) => worker.models.map((model) => model.slice(0, 60)).join(", ")],
    ["device", "", (worker) => worker.device],
    ["version", "", (worker) => worker.version],
    ["leases", "n", (worker) => count(worker.leased)],
    ["connected", "n", (worker) => age(worker.connected)],
    ["seen", "n", (worker) => `${age(worker.seen)} ago`],
  ],
  failed: ENDED,
  succeeded: ENDED,
};

function jobText(job) {
  const made = make(job.sampled ? "button" : "span", (job.sampled && job.text) || job.error || job.text || job.job);
  made.title = job.error || job.text;
  if (job.sampled) made.addEventListener("click", () => show(job.job));
  return made;
}

function drawTable(id, rows, empty) {
  const columns = TABLES[id];
  const head = make("tr");
  head.append(...columns.map(([title, kind]) => make("th", title, kind)));
  const lines = rows.map((row) => {
    const line = make("tr");
    line.append(...columns.map(([, kind, content]) => make("td", content(row), kind)));
    return line;
  });
  if (!lines.length) {
    lines.push(make("tr", make("td", empty, "empty")));
    lines[0].firstChild.colSpan = columns.length;
  }
  element(id).replaceChildren(head, ...lines);
}

// -- a trace ------------------------------------------------------------------------

let trace = null;

// White at 0, red for the prediction, blue against it.
function colour(value) {
  const size = Math.min(1, Math.abs(value));
  const parts = value > 0 ? [178, 24, 43] : [33, 102, 172];
  return `rgb(${parts.map((part) => Math.round(255 + (part - 255) * size)).join()})`;
}

function normalized(row) {
  const most = Math.max(...row.map(Math.abs));
  return row.map((value) => (most ? value / most : 0));
}

async function show(job) {
  const answer = await fetch(`jobs/${encodeURIComponent(job)}.json`);
  element("trace").hidden = false;
  element("trace-title").textContent = `Trace of ${job}`;
  element("map").hidden = !answer.ok;
  if (!answer.ok) {
    element("trace-about").textContent = (await answer.text()).trim();
    element("words").replaceChildren();
    return;
  }
  trace = await answer.json();
  element("trace-about").textContent =
    `Predicts ${JSON.stringify(trace.target)} (logit ${trace.logit?.toFixed(3) ?? "not finite"}); rule ${trace.rule}, model ${trace.model}. Each layer is divided by its largest |R|.`;
  element("site").replaceChildren(...trace.sites.map((site) => new Option(site.site)));
  paint();
  element("trace").scrollIntoView({ block: "nearest" });
}

function paint() {
  const site = trace.sites[element("site").selectedIndex];
  element("map").hidden = !site;
  if (!site) {
    element("readout").textContent = "This trace has no value per token.";
    element("words").replaceChildren();
    return;
  }
  const rows = site.values.map(normalized);
  const width = Math.max(6, Math.min(32, Math.floor(1100 / trace.tokens.length)));
  const height = rows.length > 20 ? 10 : 20;
  const canvas = element("canvas");
  canvas.width = trace.tokens.length * width;
  canvas.height = rows.length * height;
  const context = canvas.getContext("2d");
  // The last layer is on top.
  rows.forEach((row, layer) => row.forEach((value, token) => {
    context.fillStyle = colour(value);
    context.fillRect(token * width, (rows.length - 1 - layer) * height, width, height);
  }));
  element("words").replaceChildren(...trace.tokens.map((text, token) => {
    const span = make("span", text, Math.abs(rows[0][token]) > 0.6 ? "dark" : "");
    span.style.background = colour(rows[0][token]);
    return span;
  }));
  const name = (layer) => (site.layered ? `layer ${trace.layers[layer] ?? layer}, ` : "");
  canvas.onmousemove = (event) => {
    const token = Math.min(trace.tokens.length - 1, Math.floor(event.offsetX / width));
    const layer = Math.max(0, rows.length - 1 - Math.floor(event.offsetY / height));
    element("readout").textContent =
      `${name(layer)}token ${token} ${JSON.stringify(trace.tokens[token])}: R = ${site.values[layer][token]?.toPrecision(4) ?? "not finite"}`;
  };
  element("readout").textContent =
    site.layered ? `The words are coloured by layer ${trace.layers[0] ?? 0}; point at the map for values.` : "\u00a0";
}

element("site").addEventListener("change", paint);

// -- the loop -----------------------------------------------------------------------

async function refresh() {
  try {
    const answer = await fetch("state.json", { signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error((await answer.text()).trim() || answer.statusText);
    const state = await answer.json();
    element("summary").textContent = `scheduler ${state.version}, ${new Date(1000 * state.at).toLocaleTimeString()}`;
    element("summary").className = "";
    drawNumbers(state);
    drawTable("queues", state.queues.filter((queue) => queue.queued + queue.leased), "No job is queued or leased.");
    drawTable("workers", state.workers, "No worker is connected: jobs wait for one.");
    drawTable("failed", state.failed, "None.");
    drawTable("succeeded", state.succeeded, "No job has ended yet.");
  } catch (error) {
    element("summary").textContent = `No answer: ${error.message}. What is shown is old.`;
    element("summary").className = "away";
  }
  setTimeout(refresh, PERIOD);
}

refresh();
