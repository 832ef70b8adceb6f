"use strict";
// Draws /state.json again and again; nothing here changes anything on the server.

const PERIOD = 1000; // milliseconds between looks
const KEPT = 300; // looks that the curves show
const history = { ended: [], waiting: [], leased: [] };
let before = null;

const element = (id) => document.getElementById(id);

function make(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

const count = (value) => Math.round(value).toLocaleString("en");

function age(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= 2 * size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.max(0, Math.round(seconds))} s`;
}

function curve(values) {
  const most = Math.max(...values, 1e-9);
  const points = values.map(
    (value, index) => `${((100 * index) / (KEPT - 1)).toFixed(2)},${(38 - (36 * value) / most).toFixed(2)}`,
  );
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", `M${points.join("L")}`);
  svg.append(path);
  return svg;
}

function card(title, value, values) {
  const made = make("div", "", "card");
  made.append(make("b", value), make("span", title));
  if (values && values.length > 1) made.append(curve(values));
  return made;
}

function keep(values, value) {
  values.push(value);
  if (values.length > KEPT) values.shift();
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

function glance(state) {
  const ended = sum(Object.values(state.ended));
  if (before) {
    const rate = Math.max(0, ended - before.ended) / Math.max(state.at - before.at, 0.001);
    // Two pages, or a slow one, may get the same look twice.
    if (state.at > before.at) keep(history.ended, rate);
  }
  if (!before || state.at > before.at) before = { ended, at: state.at };
  const waiting = sum(state.queues.map((queue) => queue.queued));
  const leased = sum(state.queues.map((queue) => queue.leased));
  keep(history.waiting, waiting);
  keep(history.leased, leased);
  const rate = history.ended.length ? history.ended[history.ended.length - 1] : 0;
  const oldest = Math.max(0, ...state.queues.map((queue) => queue.oldest));
  const bad = ["FAILED", "QUARANTINED"].map((name) => state.ended[name] || 0);
  element("glance").replaceChildren(
    card("jobs ended per second", rate >= 10 ? count(rate) : rate.toFixed(1), history.ended),
    card(`jobs wait, the oldest for ${age(oldest)}`, count(waiting), history.waiting),
    card("jobs at workers", count(leased), history.leased),
    card("workers", count(state.workers.length)),
    card("jobs ended in all", count(ended)),
    card("failed, and set aside", bad.map(count).join(", ")),
    card("of Redis", `${(state.memory / 1e6).toFixed(1)} MB`),
  );
}

function rows(id, found, cells, empty) {
  const body = element(id).tBodies[0];
  const width = element(id).tHead.rows[0].cells.length;
  const made = found.map((row) => {
    const line = document.createElement("tr");
    line.append(...cells(row));
    return line;
  });
  if (!made.length) {
    const cell = make("td", empty, "empty");
    cell.colSpan = width;
    made.push(document.createElement("tr"));
    made[0].append(cell);
  }
  body.replaceChildren(...made);
}

function draw(state) {
  element("summary").textContent = `scheduler ${state.version}, ${new Date(1000 * state.at).toLocaleTimeString()}`;
  element("summary").className = "";
  glance(state);
  rows("queues", state.queues.filter((queue) => queue.queued + queue.leased), (queue) => [
    make("td", queue.model), make("td", queue.tenant), make("td", queue.priority),
    make("td", count(queue.queued), "n"), make("td", count(queue.leased), "n"),
    make("td", queue.queued ? age(queue.oldest) : "", "n"),
  ], "Nothing waits, nothing runs.");
  rows("workers", state.workers, (worker) => [
    make("td", worker.draining ? `${worker.id} (drains)` : worker.id, "id"),
    make("td", worker.models.map((model) => model.slice(0, 60)).join(", ")),
    make("td", worker.device), make("td", worker.version),
    make("td", count(worker.leased), "n"), make("td", age(worker.connected), "n"),
    make("td", age(worker.seen), "n"),
  ], "No worker is connected: jobs wait for one.");
  rows("mishaps", state.mishaps, ended(state), "None.");
  rows("recent", state.recent, ended(state), "No job has ended yet.");
}

function ended(state) {
  return (job) => {
    const text = make("td", "", "text");
    if (job.sampled) {
      const button = make("button", job.text || job.job);
      button.addEventListener("click", () => show(job.job));
      text.append(button);
    } else {
      text.textContent = job.error || job.text;
    }
    text.title = job.error || job.text;
    const good = job.state === "SUCCEEDED";
    return [
      make("td", `${age(state.at - job.at)} ago`), make("td", job.state.toLowerCase(), good ? "" : "bad"),
      text, make("td", job.model), make("td", job.tenant), make("td", job.worker, "id"), make("td", job.job, "id"),
    ];
  };
}

// -- a trace ------------------------------------------------------------------------

let trace = null;

// White at 0, red for the prediction, blue against it.
function colour(value) {
  const [r, g, b] = value > 0 ? [178, 24, 43] : [33, 102, 172];
  const size = Math.min(1, Math.abs(value));
  const mix = (part) => Math.round(255 + (part - 255) * size);
  return `rgb(${mix(r)},${mix(g)},${mix(b)})`;
}

function decode(site) {
  const bytes = Uint8Array.from(atob(site.values), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

async function show(job) {
  const answer = await fetch(`jobs/${encodeURIComponent(job)}.json`);
  element("trace").hidden = false;
  element("trace-title").textContent = `Trace of ${job}`;
  if (!answer.ok) {
    element("trace-about").textContent = (await answer.text()).trim();
    element("words").replaceChildren();
    element("map").hidden = true;
    return;
  }
  trace = await answer.json();
  element("trace-about").textContent =
    `Predicts ${JSON.stringify(trace.target)} (logit ${trace.logit.toFixed(3)}); rule ${trace.rule}, model ${trace.model}. Each layer is divided by its largest |R|.`;
  element("site").replaceChildren(...trace.sites.map((site) => new Option(site.site)));
  element("map").hidden = false;
  paint();
  element("trace").scrollIntoView({ block: "nearest" });
}

function paint() {
  const site = trace.sites[element("site").selectedIndex];
  element("map").hidden = !site;
  if (!site) {
    element("readout").textContent = "It has no value per token.";
    element("words").replaceChildren();
    return;
  }
  const tokens = site.shape[site.shape.length - 1];
  const layers = site.shape.length === 2 ? site.shape[0] : 1;
  const values = decode(site);
  const scaled = new Float32Array(values.length);
  for (let layer = 0; layer < layers; layer++) {
    let most = 0;
    for (let token = 0; token < tokens; token++) most = Math.max(most, Math.abs(values[layer * tokens + token]));
    for (let token = 0; token < tokens; token++) {
      scaled[layer * tokens + token] = most ? values[layer * tokens + token] / most : 0;
    }
  }
  const cell = { width: Math.max(6, Math.min(32, Math.floor(1100 / tokens))), height: layers > 20 ? 10 : 20 };
  const canvas = element("canvas");
  canvas.width = tokens * cell.width;
  canvas.height = layers * cell.height;
  const context = canvas.getContext("2d");
  for (let layer = 0; layer < layers; layer++) {
    for (let token = 0; token < tokens; token++) {
      context.fillStyle = colour(scaled[layer * tokens + token]);
      // The last layer is on top.
      context.fillRect(token * cell.width, (layers - 1 - layer) * cell.height, cell.width, cell.height);
    }
  }
  element("words").replaceChildren(...trace.tokens.map((text, token) => {
    const span = make("span", text);
    span.style.background = colour(scaled[token]);
    if (Math.abs(scaled[token]) > 0.6) span.className = "dark";
    return span;
  }));
  canvas.onmousemove = (event) => {
    const token = Math.min(tokens - 1, Math.floor(event.offsetX / cell.width));
    const layer = layers - 1 - Math.min(layers - 1, Math.floor(event.offsetY / cell.height));
    const name = site.shape.length === 2 ? `layer ${trace.layers[layer] ?? layer}, ` : "";
    element("readout").textContent =
      `${name}token ${token} ${JSON.stringify(trace.tokens[token])}: R = ${values[layer * tokens + token].toPrecision(4)}`;
  };
  element("readout").textContent =
    site.shape.length === 2 ? `The words are coloured by layer ${trace.layers[0] ?? 0}; point at the map for values.` : "\u00a0";
}

element("site").addEventListener("change", paint);

// -- the loop -----------------------------------------------------------------------

async function look() {
  try {
    const answer = await fetch("state.json", { signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error((await answer.text()).trim() || answer.statusText);
    draw(await answer.json());
  } catch (error) {
    element("summary").textContent = `No answer: ${error.message}. What is shown is old.`;
    element("summary").className = "away";
  }
  setTimeout(look, PERIOD);
}

look();
