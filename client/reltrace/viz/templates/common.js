"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);

function element(parent, kind, text = "", className = "") {
  const made = document.createElement(kind);
  made.textContent = text;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

// The colour of a value from -1 (blue) over 0 (white) to 1 (red); grey: not finite.
function colour(share) {
  if (!Number.isFinite(share)) return [128, 128, 128];
  const {negative, zero, positive} = data.colours, end = share > 0 ? positive : negative;
  return zero.map((from, i) => Math.round(from + (end[i] - from) * Math.min(1, Math.abs(share))));
}
const css = ([r, g, b]) => `rgb(${r},${g},${b})`;
// Black or white, whichever is easier to read on a colour (Rec. 709 luma).
const textColour = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b > 140 ? "#000" : "#fff";
function shade(one, rgb) {
  one.style.background = css(rgb);
  one.style.color = textColour(rgb);
}

// A label; each of its words is isolated, so that words written from right to left stay in order.
function showLabel(parent, label) {
  label.split(" \u00b7 ").forEach((word, index) => {
    const [mark] = /^(?:[\u2192\u2026] )?/.exec(word);
    parent.append(index ? " \u00b7 " : "", mark);
    element(parent, "bdi", word.slice(mark.length));
  });
}
