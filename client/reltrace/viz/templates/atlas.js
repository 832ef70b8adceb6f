const CHUNK = 300;
const LISTS = ["for the prediction", "against it", "activation +", "activation \u2212"];

// A snippet: indices of its words, the explained token (null: the next word), number of the prompt, whether it is cut at the
// beginning and at the end, and positions of words that are only the number of a part of a character.
const snippets = data.snippets.map(([words, target, prompt, before, after, parts]) =>
  ({words: words.map(word => data.words[word]), target, prompt, before, after, parts}));
// Case folding: lower case first, for letters such as \u00df whose upper case has several letters.
const fold = text => text.toLowerCase().toUpperCase();
// `printable` makes the same of a query as Python's `printable` of the words: visible white space, escaped control characters.
function escaped(char) {
  const code = char.codePointAt(0), [letter, digits] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
  return `\\${letter}${code.toString(16).padStart(digits, "0")}`;
}
const printable = text => text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u2192").replace(/\r/g, "\\r").replace(/\p{Zs}/gu, " ")
  .replace(/[\p{C}\p{Zl}\p{Zp}]/gu, char => "\u200c\u200d".includes(char) ? char : escaped(char));
for (const one of snippets) {
  one.folded = one.words.map((word, at) => one.parts.includes(at) ? "" : fold(word));
  one.text = one.folded.join("");
}
// The token that is explained where a word is strong.
const explained = (snippet, at) => snippet.target ?? (snippet.words[at + 1] ?? "").trim();
for (const [name, site] of Object.entries(data.sites)) {
  site.name = name;
  site.features = site.features.map(([layer, index, label, by, mass, means, quantiles, words, lists, sizes], rank) =>
    ({site: name, layer, index, label, by, mass, means, quantiles, words, lists, sizes, rank, count: 0, of: 0, strength: 0}));
  site.most = Math.max(0, ...site.features.map(one => one.mass));
}

const state = {site: data.sites.neuron, layer: "", sort: "mass", query: "", chosen: null, list: 0, shown: [], drawn: 0};

// -- numbers

const number = value => value === null ? "\u2013" : Number(value.toPrecision(4)).toString().replace("-", "\u2212");
const percent = share => `${Number((100 * share).toPrecision(2))} %`;

// -- search and list

// The search of `Atlas.find`, in the contexts by relevance. A context matches if the text begins at the strong token or before
// it, or is in the explained token; a neuron or head counts the matches of its list with more of them.
function matches() {
  const wanted = fold(printable(state.query));
  const place = /^\s*(\d+)\s*[\/: ]\s*(\d+)\s*$/.exec(state.query);
  const first = wanted ? snippets.map(one => beginning(one, wanted)) : [];
  const having = ([, , snippet, at]) => first[snippet] <= at || fold(explained(snippets[snippet], at)).includes(wanted);
  return state.site.features.filter(one => {
    if (state.layer !== "" && one.layer !== Number(state.layer)) return false;
    Object.assign(one, {count: 0, of: 0, strength: 0, imported: false});
    if (!wanted) return true;
    for (const list of [0, 1]) {
      const found = one.lists[list].filter(having);
      const strength = found.reduce((sum, [relevance]) => sum + Math.abs(relevance), 0);
      if (found.length > one.count || (found.length === one.count && strength >= one.strength))
        Object.assign(one, {count: found.length, of: one.sizes[list], strength});
    }
    const named = fold(printable(one.label)).includes(wanted);
    one.imported = named && one.by !== "log-odds";
    return named || one.count > 0 || (place && one.layer === Number(place[1]) && one.index === Number(place[2]));
  });
}
// Index of the first word in which the text begins.
function beginning(snippet, wanted) {
  const start = snippet.text.indexOf(wanted);
  if (start < 0) return Infinity;
  let end = 0;
  return snippet.folded.findIndex(word => (end += word.length) > start);
}
const ORDERS = {
  mass: (a, b) => a.rank - b.rank,
  layer: (a, b) => a.layer - b.layer || a.index - b.index,
  label: (a, b) => (a.label === "") - (b.label === "") || bare(a.label).localeCompare(bare(b.label)) || a.rank - b.rank,
  count: (a, b) => b.imported - a.imported || b.count - a.count || b.strength - a.strength || a.layer - b.layer || a.index - b.index,
};
const bare = label => label.replace(/^[\u2192\u2026] /, "");
function list() {
  state.shown = matches().sort(ORDERS[state.sort]);
  const site = state.site, all = site.layers * site.width;
  const held = site.features.length < all ? `; the page has the ${site.features.length} with most relevance` : "";
  $("counted").textContent = `${state.shown.length} of ${all} ${site.name}s${held}`;
  $("head").replaceChildren();
  const columns = ["layer", site.name, "relevance mass", ...(state.query ? ["contexts"] : []), "label"];
  for (const name of columns) element($("head"), "th", name).scope = "col";
  $("rows").replaceChildren();
  state.drawn = 0;
  drawMore();
  $("list").scrollTop = 0;
  $("nothing").hidden = state.shown.length > 0;
  // A neuron that is not in the list must not look like a search result.
  if (state.chosen && !state.shown.includes(state.chosen)) {
    state.chosen = null;
    history.replaceState(null, "", location.href.split("#")[0]);
  }
  showDetail();
}
function drawMore() {
  const end = Math.min(state.shown.length, state.drawn + CHUNK);
  for (; state.drawn < end; state.drawn++) $("rows").append(row(state.shown[state.drawn]));
}
function row(one) {
  const line = document.createElement("tr");
  line.dataset.key = key(one);
  line.setAttribute("aria-selected", one === state.chosen);
  element(line, "td", one.layer, "number");
  element(line, "td", one.index, "number");
  const mass = element(line, "td");
  const bar = element(mass, "span", "", "bar");
  element(bar, "i").style.width = `${100 * one.mass / (state.site.most || 1)}%`;
  mass.append(number(one.mass));
  if (state.query) element(line, "td", `${one.count} of ${one.of}`, "number");
  const label = element(line, "td", "", "label");
  showLabel(label, one.label || "\u2013");
  label.title = one.label;
  return line;
}
const key = one => `${one.site}-${one.layer}-${one.index}`;

// -- details of a neuron or head

function choose(one, scroll = true) {
  state.chosen = one;
  for (const line of $("rows").children) line.setAttribute("aria-selected", line.dataset.key === key(one));
  if (scroll) $("rows").querySelector('[aria-selected="true"]')?.scrollIntoView({block: "nearest"});
  history.replaceState(null, "", `#${key(one)}`);
  showDetail();
}
const ROLES = {at: "", before: "\u2026 ", target: "\u2192 "};
function showDetail() {
  const one = state.chosen, detail = $("detail");
  detail.replaceChildren();
  if (!one) {
    if (state.shown.length) element(detail, "p", `Choose a ${state.site.name} in the list.`);
    return;
  }
  const site = data.sites[one.site];
  const name = one.site === "neuron" ? "Neuron" : "Head";
  element(detail, "h2", `${name} ${one.index} of layer ${one.layer}`);
  const label = element(detail, "p", "", "label");
  showLabel(label, one.label || "No token stands out in its contexts.");
  if (one.by && one.label) element(label, "small", `  (${one.by === "log-odds" ? "what stands out" : `by ${one.by}`})`);
  const facts = element(detail, "div", "", "facts");
  element(facts, "span", `relevance mass ${number(one.mass)}, ${percent(one.mass / site.mass)} of all ${one.site}s (rank ${one.rank + 1})`);
  ["relevance", "activation"].forEach((measure, i) =>
    element(facts, "span", `${measure}: mean ${number(one.means[i])}; 1 %, 50 %, 99 % below ${one.quantiles[i].map(number).join(", ")}`));
  const words = element(detail, "ul", "", "words");
  for (const [token, role, count, of] of one.words) {
    const item = element(words, "li", ROLES[role]);
    element(item, "bdi", token);
    item.append(" ");
    element(item, "small", `in ${count} of ${of}`);
  }
  const tabs = element(detail, "div", "", "tabs");
  LISTS.forEach((title, index) => {
    const shown = Math.min(data.contexts, one.lists[index].length), all = one.sizes[index];
    const tab = element(tabs, "button", `${title} (${shown < all ? `${shown} of ${all}` : shown})`);
    tab.type = "button";
    tab.setAttribute("aria-pressed", index === state.list);
    tab.addEventListener("click", () => { state.list = index; showDetail(); });
  });
  const contexts = one.lists[state.list].slice(0, data.contexts), measure = state.list < 2 ? 0 : 1;
  const most = Math.max(...contexts.map(values => Math.abs(values[measure])), 0) || 1;
  if (!contexts.length) {
    element(detail, "p", "There is none in this corpus.");
    return;
  }
  const table = element(detail, "table", "", "contexts"), head = element(table, "tr");
  for (const name of ["relevance", "activation", ""]) element(head, "th", name).scope = "col";
  for (const [relevance, activation, snippet, at] of contexts) {
    const line = element(table, "tr");
    for (const value of [relevance, activation]) element(line, "td", number(value), "number");
    context(element(line, "td", "", "text"), snippets[snippet], at, [relevance, activation][measure] / most);
  }
}
// The text of a context: the strong token in colour, matches of the search marked.
function context(cell, snippet, at, share) {
  // Isolated: the explained token stays at the end, also of a text from right to left.
  const line = element(cell, "bdi");
  if (snippet.before) line.append("\u2026 ");
  const wanted = fold(printable(state.query)), text = snippet.text;
  const starts = [];
  if (wanted) for (let i = text.indexOf(wanted); i >= 0; i = text.indexOf(wanted, i + 1)) starts.push(i);
  let place = 0;
  snippet.words.forEach((word, index) => {
    const from = place;
    place += snippet.folded[index].length;
    const found = starts.some(start => start < place && start + wanted.length > from);
    // The space before a word is outside of its element, so that a line may break there.
    const space = word.length - word.trimStart().length;
    line.append(word.slice(0, space));
    const part = element(line, found ? "mark" : "span", word.slice(space) || "\u2423");
    if (index !== at) return;
    part.className = "strong";
    shade(part, colour(Math.sign(share) * (0.25 + 0.75 * Math.abs(share))));
  });
  if (snippet.after) line.append(" \u2026");
  const target = element(cell, "span", "  \u2192 ", "target"), token = explained(snippet, at);
  element(element(target, "bdi"), wanted && fold(token).includes(wanted) ? "mark" : "span", token || "\u2423");
  element(cell, "small", `   prompt ${snippet.prompt}`);
}

// -- controls and events

$("controls").addEventListener("submit", event => event.preventDefault());
$("search").addEventListener("input", event => {
  const before = state.query;
  state.query = event.target.value.trim();
  // A new search is sorted by matches; an order that was chosen since then is kept.
  if (!before && state.query) state.sort = $("sort").value = "count";
  if (before && !state.query && state.sort === "count") state.sort = $("sort").value = "mass";
  list();
});
$("controls").addEventListener("change", event => {
  // Leaving the search box is a change, too: a new list would replace the row that is being clicked.
  if (event.target.id === "search") return;
  if (event.target.name === "site") use(event.target.value);
  if (event.target.id === "layer") state.layer = event.target.value;
  if (event.target.id === "sort") state.sort = event.target.value;
  list();
});
$("rows").addEventListener("click", event => {
  const line = event.target.closest("tr");
  if (!line) return;
  choose(state.shown[line.sectionRowIndex], false);
  // In a narrow window the details are below the list, perhaps out of sight.
  if ($("detail").getBoundingClientRect().top > 0.8 * innerHeight) $("detail").scrollIntoView();
});
$("list").addEventListener("scroll", () => {
  const list = $("list");
  if (list.scrollTop + list.clientHeight > list.scrollHeight - 400) drawMore();
});
$("list").addEventListener("keydown", event => {
  const step = {ArrowDown: 1, ArrowUp: -1, PageDown: 20, PageUp: -20, Home: -Infinity, End: Infinity}[event.key];
  if (step === undefined || !state.shown.length) return;
  const at = state.shown.indexOf(state.chosen);
  const next = Math.min(state.shown.length - 1, Math.max(0, at + step));
  while (state.drawn <= next) drawMore();
  choose(state.shown[next]);
  event.preventDefault();
});
function use(name) {
  state.site = data.sites[name];
  state.layer = "";
  document.querySelector(`input[value=${name}]`).checked = true;
  $("layer").replaceChildren(new Option("all", ""));
  for (let layer = 0; layer < state.site.layers; layer++) $("layer").append(new Option(layer, layer));
}
function open() {
  const [name, layer, index] = location.hash.slice(1).split("-");
  const site = data.sites[name] || data.sites.neuron;
  use(site.name);
  list();
  const wanted = site.features.find(one => one.layer === Number(layer) && one.index === Number(index));
  const first = wanted || state.shown[0];
  if (!first) return;
  while (state.drawn <= state.shown.indexOf(first)) drawMore();
  choose(first);
}
$("subtitle").textContent = data.subtitle;
$("site-choice").hidden = !data.sites.head.features.length;
addEventListener("hashchange", open);
open();
