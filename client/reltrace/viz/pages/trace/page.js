"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const ROW = 20, COLUMN = 26, HEAD = 22, FONT = "12px system-ui, sans-serif";
const STRONGEST = 15;

function words32(text) {
  const bytes = Uint8Array.from(atob(text), char => char.charCodeAt(0));
  return new DataView(bytes.buffer);
}
function floats(text) {
  const view = words32(text);
  return Float32Array.from({length: view.byteLength / 4}, (_, i) => view.getFloat32(4 * i, true));
}
// Values by token, then by column; and the strongest features with where they stand.
for (const site of data.sites) {
  site.values = floats(site.values);
  const view = words32(site.entries);
  site.entries = Array.from({length: view.byteLength / 16}, (_, i) => ({
    column: view.getInt32(16 * i, true), token: view.getInt32(16 * i + 4, true),
    feature: view.getInt32(16 * i + 8, true), value: view.getFloat32(16 * i + 12, true),
  }));
}

const tokens = data.tokens.length;
const state = {
  site: data.sites[data.first], raw: !data.normalized, mask: false,
  // Where the pointer or the keyboard is, and what was chosen; -1: the whole row or column.
  at: null, chosen: null,
};

// -- numbers and colours

const number = value => Number.isFinite(value)
  ? value.toPrecision(4).replace("-", "\u2212") : "not finite";
function colour(share) {
  if (!Number.isFinite(share)) return [128, 128, 128];
  const end = share > 0 ? data.colours.positive : data.colours.negative;
  const part = Math.min(1, Math.abs(share));
  return data.colours.zero.map((zero, i) => Math.round(zero + (end[i] - zero) * part));
}
const css = ([r, g, b]) => `rgb(${r},${g},${b})`;
const ink = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b > 140 ? "#000" : "#fff";

const value = (token, column) => state.site.values[token * state.site.columns.length + column];
const masked = token => state.mask && token === 0;
function largest(values) {
  let most = 0;
  for (const one of values) if (Number.isFinite(one) && Math.abs(one) > most) most = Math.abs(one);
  return most;
}
function* shownOf(column) {
  for (let token = 0; token < tokens; token++) if (!masked(token)) yield value(token, column);
}
// What each column is divided by: its own largest value, or everyone's.
function rescale() {
  const each = state.site.columns.map((_, column) => largest(shownOf(column)));
  const most = largest(each);
  state.scales = each.map(own => (state.raw ? most : own) || 1);
  state.limit = state.raw ? most || 1 : 1;
}

// What is written from the right to the left turns nothing around it.
const isolated = text => `\u2068${text}\u2069`;
const quoted = token => `\u201c${isolated(data.tokens[token].trim())}\u201d`;

// -- the text

// A turn of a conversation is a block of its own; what the template puts around it is between.
const turnOf = new Map();
for (const {first, stop, role} of data.segments) {
  const block = document.createElement("div");
  for (let token = first; token < stop; token++) turnOf.set(token, {role, block});
  if (role) {
    block.className = "turn";
    block.append(Object.assign(document.createElement("b"), {className: "role", textContent: role}));
  }
  $("words").append(block);
}
const turns = data.segments.filter(({role}) => role);
const spans = data.words.map((word, token) => {
  const span = document.createElement("span");
  span.textContent = word;
  if (data.special[token]) span.className = "special";
  span.addEventListener("click", () => choose({token, column: -1}));
  span.addEventListener("mouseenter", () => { state.at = {token, column: -1}; move(false); });
  turnOf.get(token).block.append(span);
  return span;
});
function textValues() {
  const site = state.site;
  const chosen = state.chosen && state.chosen.column >= 0 ? state.chosen.column : site.textColumn;
  const all = site.columns.map((_, column) => column);
  const values = data.words.map((_, token) => chosen >= 0 ? value(token, chosen)
    : all.reduce((sum, column) => sum + value(token, column), 0));
  const name = !site.layered ? "" : chosen >= 0 ? `, layer ${site.columns[chosen]}` : ", sum over layers";
  return [values, `site ${site.name}${name}`];
}
function paintText() {
  const [values, title] = textValues();
  const most = largest(values.filter((_, token) => !masked(token))) || 1;
  values.forEach((one, token) => {
    const shade = masked(token) ? [255, 255, 255] : colour(one / most);
    spans[token].style.background = css(shade);
    spans[token].style.color = ink(shade);
    spans[token].title = `${token}: ${isolated(data.tokens[token])}  ${number(one)}`;
    spans[token].classList.toggle("masked", masked(token));
  });
  $("text-title").textContent = `Text coloured by ${title}.`;
}

// -- the heatmap: only what is in view is drawn, so that thousands of tokens are no burden

const map = $("map"), canvas = $("canvas"), pen = canvas.getContext("2d");
// On the left of the tokens: whose turn they are of.
const BAND = turns.length ? 20 : 0;
let gutter = 0, fresh = true;
function layout() {
  pen.font = FONT;
  const longest = data.tokens.reduce((most, token) => Math.max(most, pen.measureText(token).width), 0);
  gutter = BAND + Math.ceil(Math.min(190, Math.max(60, longest + 14)));
  const width = gutter + state.site.columns.length * COLUMN + 1;
  const height = HEAD + tokens * ROW + 1;
  $("extent").style.width = `${width}px`;
  $("extent").style.height = `${height}px`;
  map.style.width = `${width}px`;
  const inside = {width: Math.min(width, map.clientWidth || width), height: Math.min(height, Math.round(innerHeight * 0.75))};
  const ratio = devicePixelRatio || 1;
  canvas.width = inside.width * ratio;
  canvas.height = inside.height * ratio;
  canvas.style.width = `${inside.width}px`;
  canvas.style.height = `${inside.height}px`;
  map.style.height = `${inside.height}px`;
  paint();
}
function paint() {
  if (!fresh) return;
  fresh = false;
  requestAnimationFrame(() => { fresh = true; draw(); });
}
function draw() {
  const site = state.site, ratio = devicePixelRatio || 1;
  const width = canvas.width / ratio, height = canvas.height / ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.font = FONT;
  pen.textBaseline = "middle";
  const firstRow = Math.floor(map.scrollTop / ROW), firstColumn = Math.floor(map.scrollLeft / COLUMN);
  const lastRow = Math.min(tokens, firstRow + Math.ceil(height / ROW) + 1);
  const lastColumn = Math.min(site.columns.length, firstColumn + Math.ceil(width / COLUMN) + 1);
  const x = column => gutter + column * COLUMN - map.scrollLeft;
  const y = token => HEAD + token * ROW - map.scrollTop;
  for (let token = firstRow; token < lastRow; token++) {
    for (let column = firstColumn; column < lastColumn; column++) {
      const share = value(token, column) / state.scales[column];
      const shade = masked(token) ? [235, 235, 235] : colour(share);
      pen.fillStyle = css(shade);
      pen.fillRect(x(column), y(token), COLUMN - 1, ROW - 1);
      // Sign by more than hue: for those who see no difference, and in print.
      if (!masked(token) && share < -0.1) {
        pen.fillStyle = ink(shade);
        pen.fillRect(x(column) + COLUMN / 2 - 4, y(token) + ROW / 2 - 1, 7, 1);
      }
    }
  }
  mark(state.chosen, x, y, "#1a56c4");
  mark(state.at, x, y, "#111");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, gutter, height);
  pen.fillRect(0, 0, width, HEAD);
  pen.fillStyle = "#333";
  pen.textAlign = "right";
  for (let token = firstRow; token < lastRow; token++) {
    if (y(token) > HEAD - ROW / 2) pen.fillText(cut(data.tokens[token]), gutter - 7, y(token) + ROW / 2);
  }
  pen.textAlign = "center";
  for (const {first, stop, role} of turns) drawTurn(Math.max(HEAD, y(first)), Math.min(height, y(stop)), role);
  const every = Math.max(1, ...site.columns.map(name => Math.ceil((pen.measureText(name).width + 6) / COLUMN)));
  for (let column = firstColumn; column < lastColumn; column++) {
    if ((column % every === 0 || !site.layered) && x(column) >= gutter - COLUMN / 2) {
      pen.fillText(site.columns[column], x(column) + COLUMN / 2, HEAD / 2);
    }
  }
}
function drawTurn(top, bottom, role) {
  if (bottom <= top) return;
  pen.fillStyle = "#888";
  pen.fillRect(BAND - 4, top, 3, bottom - top - 1);
  pen.fillStyle = "#333";
  if (bottom - top < pen.measureText(role).width) return;
  pen.save();
  pen.translate(BAND / 2 - 2, (top + bottom) / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText(role, 0, 0);
  pen.restore();
}
function mark(place, x, y, colour) {
  if (!place) return;
  pen.strokeStyle = colour;
  pen.lineWidth = 2;
  const [left, columns] = place.column < 0 ? [0, state.site.columns.length] : [place.column, 1];
  const [top, rows] = place.token < 0 ? [0, tokens] : [place.token, 1];
  pen.strokeRect(x(left), y(top), columns * COLUMN - 1, rows * ROW - 1);
}
const cuts = new Map();
function cut(word) {
  if (!cuts.has(word)) {
    let short = word;
    while (short.length > 1 && pen.measureText(short).width > gutter - BAND - 14) short = short.slice(0, -1);
    cuts.set(word, short === word ? word : `${short.slice(0, -1)}\u2026`);
  }
  return cuts.get(word);
}
// Where a point of the canvas is: a cell, a layer's name, or a token's.
function placeAt(event) {
  const left = event.offsetX, top = event.offsetY;
  const column = left < gutter ? -1 : Math.floor((left - gutter + map.scrollLeft) / COLUMN);
  const token = top < HEAD ? -1 : Math.floor((top - HEAD + map.scrollTop) / ROW);
  if (column >= state.site.columns.length || token >= tokens || (column < 0 && token < 0)) return null;
  return {token, column};
}

// -- what is said of a place

const nameOf = column => state.site.layered ? `layer ${state.site.columns[column]}` : `site ${state.site.name}`;
function describe(place) {
  if (!place) return "Point at a cell, or move with the arrow keys; click for what is strongest there.";
  const parts = [];
  if (place.token >= 0) {
    const {role} = turnOf.get(place.token);
    parts.push(`token ${place.token} ${quoted(place.token)}${role && ` (${role})`}`);
  }
  if (place.column >= 0) parts.push(nameOf(place.column));
  if (place.token < 0 || place.column < 0) return parts.join(", ");
  const one = value(place.token, place.column);
  const note = masked(place.token) ? " (masked)" : "";
  return `${parts.join(", ")}: R = ${number(one)}, ${number(one / (largest(shownOf(place.column)) || 1))} of the largest there${note}`;
}
function move(scroll) {
  $("readout").textContent = describe(state.at);
  spans.forEach((span, token) => span.classList.toggle("here", !!state.at && state.at.token === token));
  if (scroll && state.at) {
    const left = state.at.column * COLUMN, top = state.at.token * ROW;
    const wide = map.clientWidth - gutter, high = map.clientHeight - HEAD;
    map.scrollLeft = Math.min(left, Math.max(map.scrollLeft, left + COLUMN - wide));
    map.scrollTop = Math.min(top, Math.max(map.scrollTop, top + ROW - high));
  }
  paint();
}
function choose(place) {
  state.chosen = state.at = place;
  move(true);
  paintText();
  showDetail();
}
function cell(row, text, kind = "td") {
  const one = document.createElement(kind);
  one.textContent = text;
  row.append(one);
  return one;
}
// A label, each of its words on its own: written from the right to the left, they stay in order.
function called(one, label) {
  one.className = "label";
  label.split(" \u00b7 ").forEach((word, index) => {
    const [mark] = /^(?:[\u2192\u2026] )?/.exec(word);
    const apart = Object.assign(document.createElement("bdi"), {textContent: word.slice(mark.length)});
    one.append(index ? " \u00b7 " : "", mark, apart);
  });
}
function describePart(token, layer) {
  const parts = token >= 0 && token !== null ? [`token ${token} ${quoted(token)}`] : [];
  if (layer !== null) parts.push(`layer ${layer}`);
  return parts.join(", ") || "the whole trace";
}
// What people look for first.
const RANK = {neuron: 0, head: 1, unit: 2};
function showDetail() {
  const detail = $("detail"), place = state.chosen;
  detail.replaceChildren();
  const sites = data.sites.filter(site => site.entries.length)
    .sort((a, b) => RANK[a.feature] - RANK[b.feature]);
  if (!sites.length) {
    detail.append(Object.assign(document.createElement("p"), {textContent:
      "This trace holds sums, not single neurons or heads. A trace with sites=[\"neuron\", \"head\"] and reduce=\"full\" or \"topk\" shows them here."}));
    return;
  }
  for (const site of sites) {
    // Layers by their names: another site may hold others.
    const layer = place && place.column >= 0 && state.site.layered ? state.site.columns[place.column] : null;
    const there = site.entries.filter(entry => !place ||
      ((place.token < 0 || entry.token === place.token) &&
       (layer === null || !site.layered || site.columns[entry.column] === layer)) && !masked(entry.token));
    there.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const where = describePart(place && place.token, site.layered ? layer : null);
    detail.append(Object.assign(document.createElement("h2"), {textContent: `Strongest ${site.feature}s (site ${site.name}): ${where}`}));
    const table = detail.appendChild(document.createElement("table"));
    table.dataset.site = site.name;
    const head = table.createTHead().insertRow();
    for (const name of [site.feature, ...(site.layered ? ["layer"] : []), "position", "token", "R", ...(site.labels ? ["label"] : [])]) cell(head, name, "th");
    const body = table.createTBody();
    const most = largest(there.map(entry => entry.value)) || 1;
    for (const entry of there.slice(0, STRONGEST)) {
      const row = body.insertRow();
      cell(row, entry.feature).className = "number";
      if (site.layered) cell(row, site.columns[entry.column]).className = "number";
      // In a long prompt many tokens read the same.
      cell(row, entry.token).className = "number";
      cell(row, data.tokens[entry.token]);
      const last = cell(row, number(entry.value));
      last.className = "number";
      const swatch = document.createElement("i");
      swatch.style.background = css(colour(entry.value / most));
      last.prepend(swatch);
      if (site.labels) called(cell(row, ""), site.labels[site.columns[entry.column]]?.[entry.feature] ?? "");
    }
    if (!there.length) detail.append(Object.assign(document.createElement("p"), {textContent: "None of those on this page."}));
    if (site.note) detail.append(Object.assign(document.createElement("p"), {textContent: site.note}));
  }
}

// -- what people do

function show() {
  rescale();
  const sums = [0, 0];
  state.site.values.forEach((one, at) => { if (Number.isFinite(one)) sums[at < state.site.columns.length ? 0 : 1] += Math.abs(one); });
  const first = sums[0] + sums[1] ? ` The first token has ${Math.round(100 * sums[0] / (sums[0] + sums[1]))} % of |R|.` : "";
  const divided = state.site.layered ? "each layer divided by its largest |R|" : "divided by the largest |R|";
  $("subtitle").textContent = `Site ${state.site.name}${state.site.what}, ${state.raw ? "raw relevance" : divided}${state.mask ? ", first token masked" : ""}.${first}`;
  $("low").textContent = number(-state.limit);
  $("high").textContent = number(state.limit);
  paintText();
  move(false);
}
$("next").textContent = data.next && `Likeliest next: ${data.next}.`;
$("hints").append(...data.hints.map(hint => Object.assign(document.createElement("li"), {textContent: hint})));
data.sites.forEach((site, index) => $("site").append(new Option(site.name, index)));
$("site").value = data.first;
$("site-choice").hidden = data.sites.length < 2;
$("bar").style.background = `linear-gradient(to right, ${css(colour(-1))}, ${css(colour(0))}, ${css(colour(1))})`;
document.querySelector(`input[value=${state.raw ? "raw" : "layer"}]`).checked = true;
$("mask").checked = false;
$("controls").addEventListener("change", event => {
  if (event.target.id === "site") {
    state.site = data.sites[event.target.value];
    state.at = state.chosen = null;
    show();
    layout();
  }
  state.raw = document.querySelector("input[name=scale]:checked").value === "raw";
  state.mask = $("mask").checked;
  show();
  showDetail();
});
map.addEventListener("scroll", paint);
canvas.addEventListener("mousemove", event => { state.at = placeAt(event); move(false); });
canvas.addEventListener("mouseleave", () => { state.at = state.chosen; move(false); });
canvas.addEventListener("click", event => { const place = placeAt(event); if (place) choose(place); });
const STEPS = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
  PageUp: [-20, 0], PageDown: [20, 0], Home: [0, -Infinity], End: [0, Infinity],
};
map.addEventListener("keydown", event => {
  const inside = (one, count) => Math.min(count - 1, Math.max(0, one));
  const at = {token: Math.max(0, state.at?.token ?? 0), column: Math.max(0, state.at?.column ?? 0)};
  if (event.key === "Enter" || event.key === " ") choose(at);
  else if (event.key === "Escape") { state.chosen = null; show(); showDetail(); }
  else if (STEPS[event.key]) {
    let [down, right] = STEPS[event.key];
    if (event.ctrlKey && !Number.isFinite(right)) [down, right] = [right, 0];
    const moved = state.at && state.at.token >= 0 && state.at.column >= 0;
    state.at = !moved && Number.isFinite(down + right) && Math.abs(down + right) === 1 ? at
      : {token: inside(at.token + down, tokens), column: inside(at.column + right, state.site.columns.length)};
    move(true);
  } else return;
  event.preventDefault();
});
addEventListener("resize", layout);
show();
layout();
showDetail();
