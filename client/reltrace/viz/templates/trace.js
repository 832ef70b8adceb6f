const ROW = 20, COLUMN = 26, HEAD = 22, FONT = "12px system-ui, sans-serif";
const STRONGEST = 15;

const decode = text => Uint8Array.from(atob(text), char => char.charCodeAt(0)).buffer;
// Values by token and then by column; and the strongest features with their places.
for (const site of data.sites) {
  const entries = decode(site.entries), ints = new Int32Array(entries), floats = new Float32Array(entries);
  site.values = new Float32Array(decode(site.values));
  site.entries = Array.from({length: ints.length / 4}, (_, i) =>
    ({column: ints[4 * i], token: ints[4 * i + 1], feature: ints[4 * i + 2], value: floats[4 * i + 3]}));
}

const tokens = data.tokens.length;
const state = {
  site: data.sites[data.first], raw: !data.normalized, mask: false,
  // Places of the pointer or keyboard, and of the last click; -1: the whole row or column.
  at: null, chosen: null,
};

// -- numbers

const number = value => Number.isFinite(value) ? value.toPrecision(4).replace("-", "\u2212") : "not finite";
const value = (token, column) => state.site.values[token * state.site.columns.length + column];
const masked = token => state.mask && token === 0;
const largest = values => values.reduce((most, one) => Number.isFinite(one) ? Math.max(most, Math.abs(one)) : most, 0);
const largestOf = column => largest(data.tokens.map((_, token) => masked(token) ? 0 : value(token, column)));
// The divisor of each column: its own largest |value|, or that of all columns.
function rescale() {
  const each = state.site.columns.map((_, column) => largestOf(column)), most = largest(each);
  state.scales = each.map(own => (state.raw ? most : own) || 1);
  state.limit = state.raw ? most || 1 : 1;
}

// Isolated: text from right to left does not turn what is around it.
const isolated = text => `\u2068${text}\u2069`;
const quoted = token => `\u201c${isolated(data.tokens[token].trim())}\u201d`;
const nameOf = column => state.site.layered ? `layer ${state.site.columns[column]}` : `site ${state.site.name}`;

// -- the text: a block for each turn of a conversation, and for what the template puts between turns

const roles = [], spans = [];
for (const {first, stop, role} of data.segments) {
  const block = element($("words"), "div", "", role && "turn");
  if (role) element(block, "b", role, "role");
  for (let token = first; token < stop; token++) {
    const span = element(block, "span", data.words[token], data.special[token] && "special");
    span.addEventListener("click", () => choose({token, column: -1}));
    span.addEventListener("mouseenter", () => { state.at = {token, column: -1}; move(false); });
    spans.push(span);
    roles.push(role);
  }
}
function paintText() {
  const site = state.site, chosen = state.chosen?.column >= 0 ? state.chosen.column : site.textColumn;
  const values = spans.map((_, token) => chosen >= 0 ? value(token, chosen)
    : site.columns.reduce((sum, _, column) => sum + value(token, column), 0));
  const most = largest(values.filter((_, token) => !masked(token))) || 1;
  spans.forEach((span, token) => {
    shade(span, masked(token) ? [255, 255, 255] : colour(values[token] / most));
    span.title = `${token}: ${isolated(data.tokens[token])}  ${number(values[token])}`;
    span.classList.toggle("masked", masked(token));
  });
  const which = !site.layered ? "" : chosen >= 0 ? `, layer ${site.columns[chosen]}` : ", sum over layers";
  $("text-title").textContent = `Text coloured by site ${site.name}${which}.`;
}

// -- the heatmap: only what is in view is drawn, so that thousands of tokens cost nothing

const map = $("map"), canvas = $("canvas"), ctx = canvas.getContext("2d");
const turns = data.segments.filter(({role}) => role);
// On the left of the tokens: the roles of the turns.
const BAND = turns.length ? 20 : 0;
let gutter = 0, requested = false;
const xOf = column => gutter + column * COLUMN - map.scrollLeft;
const yOf = token => HEAD + token * ROW - map.scrollTop;
function layout() {
  ctx.font = FONT;
  const longest = data.tokens.reduce((most, token) => Math.max(most, ctx.measureText(token).width), 0);
  gutter = BAND + Math.ceil(Math.min(190, Math.max(60, longest + 14)));
  const width = gutter + state.site.columns.length * COLUMN + 1, height = HEAD + tokens * ROW + 1;
  Object.assign($("extent").style, {width: `${width}px`, height: `${height}px`});
  map.style.width = `${width}px`;
  const seen = {width: Math.min(width, map.clientWidth || width), height: Math.min(height, Math.round(innerHeight * 0.75))};
  for (const side of ["width", "height"]) {
    canvas[side] = seen[side] * (devicePixelRatio || 1);
    canvas.style[side] = `${seen[side]}px`;
  }
  map.style.height = canvas.style.height;
  paint();
}
function paint() {
  if (requested) return;
  requested = true;
  requestAnimationFrame(() => { requested = false; draw(); });
}
function fill(style, ...rectangle) {
  ctx.fillStyle = style;
  ctx.fillRect(...rectangle);
}
function draw() {
  const {columns, layered} = state.site, ratio = devicePixelRatio || 1;
  const width = canvas.width / ratio, height = canvas.height / ratio;
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  Object.assign(ctx, {font: FONT, textBaseline: "middle"});
  fill("#fff", 0, 0, width, height);
  const firstRow = Math.floor(map.scrollTop / ROW), firstColumn = Math.floor(map.scrollLeft / COLUMN);
  const lastRow = Math.min(tokens, firstRow + Math.ceil(height / ROW) + 1);
  const lastColumn = Math.min(columns.length, firstColumn + Math.ceil(width / COLUMN) + 1);
  for (let token = firstRow; token < lastRow; token++) {
    for (let column = firstColumn; column < lastColumn; column++) {
      const share = value(token, column) / state.scales[column];
      const rgb = masked(token) ? [235, 235, 235] : colour(share);
      fill(css(rgb), xOf(column), yOf(token), COLUMN - 1, ROW - 1);
      // A dash for the sign: for those who do not see the difference of the colours, and in print.
      if (!masked(token) && share < -0.1) fill(textColour(rgb), xOf(column) + COLUMN / 2 - 4, yOf(token) + ROW / 2 - 1, 7, 1);
    }
  }
  mark(state.chosen, "#1a56c4");
  mark(state.at, "#111");
  fill("#fff", 0, 0, gutter, height);
  fill("#fff", 0, 0, width, HEAD);
  Object.assign(ctx, {fillStyle: "#333", textAlign: "right"});
  for (let token = firstRow; token < lastRow; token++) {
    if (yOf(token) > HEAD - ROW / 2) ctx.fillText(shortened(data.tokens[token]), gutter - 7, yOf(token) + ROW / 2);
  }
  ctx.textAlign = "center";
  const widest = Math.max(...columns.map(name => ctx.measureText(name).width));
  const every = layered ? Math.max(1, Math.ceil((widest + 6) / COLUMN)) : 1;
  for (let column = firstColumn; column < lastColumn; column++) {
    if (column % every === 0 && xOf(column) >= gutter - COLUMN / 2) ctx.fillText(columns[column], xOf(column) + COLUMN / 2, HEAD / 2);
  }
  for (const {first, stop, role} of turns) drawTurn(Math.max(HEAD, yOf(first)), Math.min(height, yOf(stop)), role);
}
function drawTurn(from, to, role) {
  if (to <= from) return;
  fill("#888", BAND - 4, from, 3, to - from - 1);
  if (to - from < ctx.measureText(role).width) return;
  ctx.save();
  ctx.fillStyle = "#333";
  ctx.translate(BAND / 2 - 2, (from + to) / 2);
  ctx.rotate(-Math.PI / 2);
  ctx.fillText(role, 0, 0);
  ctx.restore();
}
function mark(place, style) {
  if (!place) return;
  const [column, columns] = place.column < 0 ? [0, state.site.columns.length] : [place.column, 1];
  const [token, rows] = place.token < 0 ? [0, tokens] : [place.token, 1];
  Object.assign(ctx, {strokeStyle: style, lineWidth: 2});
  ctx.strokeRect(xOf(column), yOf(token), columns * COLUMN - 1, rows * ROW - 1);
}
function shortened(word) {
  const room = gutter - BAND - 14;
  if (ctx.measureText(word).width <= room) return word;
  let length = word.length;
  while (length > 1 && ctx.measureText(word.slice(0, length)).width > room) length--;
  return `${word.slice(0, length - 1)}\u2026`;
}
// The place of a point of the canvas: a cell, the name of a column, or a token.
function placeAt({offsetX, offsetY}) {
  const column = offsetX < gutter ? -1 : Math.floor((offsetX - gutter + map.scrollLeft) / COLUMN);
  const token = offsetY < HEAD ? -1 : Math.floor((offsetY - HEAD + map.scrollTop) / ROW);
  return column >= state.site.columns.length || token >= tokens || (column < 0 && token < 0) ? null : {token, column};
}

// -- the line that describes a cell, and the tables of the strongest entries

function describe(place) {
  if (!place) return "Point at a cell, or move with the arrow keys; click for what is strongest there.";
  const {token, column} = place, parts = [];
  if (token >= 0) parts.push(`token ${token} ${quoted(token)}${roles[token] && ` (${roles[token]})`}`);
  if (column >= 0) parts.push(nameOf(column));
  if (token < 0 || column < 0) return parts.join(", ");
  const one = value(token, column), share = number(one / (largestOf(column) || 1));
  return `${parts.join(", ")}: R = ${number(one)}, ${share} of the largest there${masked(token) ? " (masked)" : ""}`;
}
function move(scroll) {
  $("readout").textContent = describe(state.at);
  spans.forEach((span, token) => span.classList.toggle("here", state.at?.token === token));
  if (scroll && state.at) {
    const x = state.at.column * COLUMN, y = state.at.token * ROW;
    map.scrollLeft = Math.min(x, Math.max(map.scrollLeft, x + COLUMN - map.clientWidth + gutter));
    map.scrollTop = Math.min(y, Math.max(map.scrollTop, y + ROW - map.clientHeight + HEAD));
  }
  paint();
}
function choose(place) {
  state.chosen = state.at = place;
  move(true);
  paintText();
  showDetail();
}
// The order of the tables.
const RANK = {neuron: 0, head: 1, unit: 2};
function showDetail() {
  const detail = $("detail"), place = state.chosen;
  detail.replaceChildren();
  const sites = data.sites.filter(site => site.entries.length).sort((a, b) => RANK[a.feature] - RANK[b.feature]);
  if (!sites.length) element(detail, "p", "This trace holds sums, not single neurons or heads. "
    + 'A trace with sites=["neuron", "head"] and reduce="full" or "topk" shows them here.');
  for (const site of sites) {
    // By the names of layers: another site may hold other layers.
    const layer = place?.column >= 0 && state.site.layered && site.layered ? state.site.columns[place.column] : null;
    const entries = site.entries.filter(({token, column}) => !place || !masked(token)
      && (place.token < 0 || token === place.token) && (layer === null || site.columns[column] === layer));
    entries.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const where = [...(place?.token >= 0 ? [`token ${place.token} ${quoted(place.token)}`] : []), ...(layer === null ? [] : [`layer ${layer}`])];
    element(detail, "h2", `Strongest ${site.feature}s (site ${site.name}): ${where.join(", ") || "the whole trace"}`);
    showEntries(detail, site, entries);
    if (!entries.length) element(detail, "p", "None of those on this page.");
    if (site.note) element(detail, "p", site.note);
  }
}
function showEntries(parent, site, entries) {
  const table = element(parent, "table"), head = table.createTHead().insertRow(), body = table.createTBody();
  table.dataset.site = site.name;
  const titles = [site.feature, ...(site.layered ? ["layer"] : []), "position", "token", "R", ...(site.labels ? ["label"] : [])];
  for (const title of titles) element(head, "th", title);
  const most = largest(entries.map(entry => entry.value)) || 1;
  for (const {feature, column, token, value} of entries.slice(0, STRONGEST)) {
    const row = body.insertRow();
    element(row, "td", feature, "number");
    if (site.layered) element(row, "td", site.columns[column], "number");
    // In a long prompt many tokens have the same text.
    element(row, "td", token, "number");
    element(row, "td", data.tokens[token]);
    const cell = element(row, "td", "", "number");
    element(cell, "i").style.background = css(colour(value / most));
    cell.append(number(value));
    if (site.labels) showLabel(element(row, "td", "", "label"), site.labels[site.columns[column]]?.[feature] ?? "");
  }
}

// -- controls and events

function show() {
  rescale();
  const site = state.site, sums = [0, 0];
  site.values.forEach((one, i) => { if (Number.isFinite(one)) sums[i < site.columns.length ? 0 : 1] += Math.abs(one); });
  const share = sums[0] + sums[1] ? ` The first token has ${Math.round(100 * sums[0] / (sums[0] + sums[1]))} % of |R|.` : "";
  const divided = state.raw ? "raw relevance" : site.layered ? "each layer divided by its largest |R|" : "divided by the largest |R|";
  $("subtitle").textContent = `Site ${site.name}${site.what}, ${divided}${state.mask ? ", first token masked" : ""}.${share}`;
  $("low").textContent = number(-state.limit);
  $("high").textContent = number(state.limit);
  paintText();
  move(false);
}
$("next").textContent = data.next && `Likeliest next: ${data.next}.`;
for (const hint of data.hints) element($("hints"), "li", hint);
data.sites.forEach((site, index) => $("site").append(new Option(site.name, index)));
$("site").value = data.first;
$("site-choice").hidden = data.sites.length < 2;
$("bar").style.background = `linear-gradient(to right, ${[-1, 0, 1].map(share => css(colour(share)))})`;
document.querySelector(`input[value=${state.raw ? "raw" : "layer"}]`).checked = true;
$("mask").checked = false;
$("controls").addEventListener("change", event => {
  const other = event.target.id === "site";
  if (other) Object.assign(state, {site: data.sites[event.target.value], at: null, chosen: null});
  state.raw = document.querySelector("input[name=scale]:checked").value === "raw";
  state.mask = $("mask").checked;
  show();
  if (other) layout();
  showDetail();
});
map.addEventListener("scroll", paint);
canvas.addEventListener("mousemove", event => { state.at = placeAt(event); move(false); });
canvas.addEventListener("mouseleave", () => { state.at = state.chosen; move(false); });
canvas.addEventListener("click", event => { const place = placeAt(event); if (place) choose(place); });
// Tokens and columns that a key moves by.
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
    // The first arrow key only shows the place.
    const begins = !(state.at?.token >= 0 && state.at?.column >= 0) && Math.abs(down + right) === 1;
    state.at = begins ? at : {token: inside(at.token + down, tokens), column: inside(at.column + right, state.site.columns.length)};
    move(true);
  } else return;
  event.preventDefault();
});
addEventListener("resize", layout);
show();
layout();
showDetail();
