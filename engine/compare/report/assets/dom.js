"use strict";
// Elements, numbers and markers. Text goes in as text nodes only, so no name can become markup.

const SVG = "http://www.w3.org/2000/svg";
const MINUS = "\u2212";
const COLORS = ["#2f6fc4", "#d1601f", "#2c8a57", "#b2447c", "#7a5cc4", "#8a7716", "#158a98", "#c43b3b"];
const SHAPES = ["circle", "square", "triangle", "diamond", "cross"];

function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, rule] of Object.entries(value)) node.style.setProperty(name, rule);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// The value at "a.b.0.c" of a nested record; undefined where there is none.
function at(record, path) {
  return path.split(".").reduce((value, key) => value?.[key], record);
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

// Four significant digits at most; the sign is a minus, not a hyphen.
function plain(value, digits = 4) {
  if (!isNumber(value)) return value === null || value === undefined ? "" : String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e15 || size < 1e-4
    ? value.toExponential(digits - 1)
    : size >= 10 ** (digits - 1) ? Math.round(value).toLocaleString("en-US") : String(+value.toPrecision(digits));
  return text.replace("-", MINUS);
}

function fixed(value, digits) {
  return value.toFixed(digits).replace("-", MINUS);
}

function tick(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
  return String(+value.toPrecision(6)).replace("-", MINUS);
}

// Ticks with the same decimals, as far as these are few.
function tickTexts(values) {
  const texts = values.map(tick);
  const decimals = Math.max(0, ...texts.map((text) => (/\.\d+$/.exec(text)?.[0].length ?? 1) - 1));
  const even = decimals <= 3 && texts.every((text) => /^[\d.\u2212]+$/.test(text)) && Math.max(...values) < 100 * Math.max(Math.min(...values.filter((value) => value > 0)), 1e-9);
  return even ? values.map((value) => fixed(value, decimals)) : texts;
}

// A small sign of a model: its colour and its shape, so that neither alone carries the meaning.
function marker(model) {
  const fill = { fill: model.color };
  const drawn = {
    circle: () => svg("circle", { cx: 6, cy: 6, r: 5, ...fill }),
    square: () => svg("rect", { x: 1.4, y: 1.4, width: 9.2, height: 9.2, ...fill }),
    triangle: () => svg("path", { d: "M6 .6 11.6 10.8H.4Z", ...fill }),
    diamond: () => svg("path", { d: "M6 0 12 6 6 12 0 6Z", ...fill }),
    cross: () => svg("path", { d: "M4 0h4v4h4v4h-4v4h-4v-4h-4v-4h4z", ...fill }),
  }[model.shape]();
  const node = svg("svg", { viewBox: "0 0 12 12", class: "marker", "aria-hidden": "true" }, drawn);
  if (model.baseline) node.append(svg("circle", { cx: 6, cy: 6, r: 8.2, fill: "none", stroke: "currentColor", "stroke-width": 1.3 }));
  return node;
}

// A labelled select; options: [[value, text, group?]].
function choice(label, options, value, change, properties = {}, style = null) {
  const groups = new Map();
  const select = h("select", { ...properties, onchange: () => change(select.value) });
  for (const [key, text, group] of options) {
    const option = h("option", { value: key }, text);
    if (group && !groups.has(group)) {
      groups.set(group, h("optgroup", { label: group }));
      select.append(groups.get(group));
    }
    (groups.get(group) ?? select).append(option);
  }
  select.value = value;
  return h("label", { class: style }, label, select);
}

function check(label, value, change, properties = {}) {
  const box = h("input", { type: "checkbox", ...properties, onchange: () => change(box.checked) });
  box.checked = value;
  return h("label", { class: "check" }, box, label);
}

function section(id, title, lead) {
  const node = h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title));
  if (lead) node.append(h("p", { class: "lead" }, lead));
  return node;
}

// A resolved colour of the style sheet, for canvases, which do not know its variables.
function ink(variable) {
  const probe = h("i", { style: { color: `var(${variable})`, display: "none" } });
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}
