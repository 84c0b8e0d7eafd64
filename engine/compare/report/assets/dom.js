"use strict";
// Elements, numbers and markers. Text is added as text nodes only, so no name can become markup.

const SVG = "http://www.w3.org/2000/svg";
const COLORS = ["#2f6fc4", "#d1601f", "#2c8a57", "#b2447c", "#7a5cc4", "#8a7716", "#158a98", "#c43b3b"];
const SHAPES = [ // in a square of 12
  "M6 1a5 5 0 1 1-.01 0Z", "M1.4 1.4h9.2v9.2H1.4Z", "M6 .6 11.6 10.8H.4Z", "M6 0 12 6 6 12 0 6Z",
  "M4 0h4v4h4v4h-4v4h-4v-4h-4v-4h4Z",
];

// An element with attributes (null and false: none) and listeners ("onclick"); style sets properties.
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

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

const plain = (value, digits) =>
  (value >= 10 ** (digits - 1) ? Math.round(value).toLocaleString("en-US") : String(+value.toPrecision(digits)));

// The sign of a model: colour and shape, so that neither alone carries the meaning.
function marker(model) {
  const node = svg("svg", { viewBox: "0 0 12 12", class: "marker", "aria-hidden": "true" }, svg("path", { d: model.shape, fill: model.color }));
  if (model.baseline) node.append(svg("circle", { cx: 6, cy: 6, r: 8.2, fill: "none", stroke: "currentColor", "stroke-width": 1.3 }));
  return node;
}

// A labelled select; options: [[value, text, group?]].
function choice(label, options, value, change, properties = {}, style = null) {
  const select = h("select", { ...properties, onchange: () => change(select.value) });
  const groups = new Map();
  for (const [key, text, group] of options) {
    if (group && !groups.has(group)) {
      groups.set(group, h("optgroup", { label: group }));
      select.append(groups.get(group));
    }
    (groups.get(group) ?? select).append(h("option", { value: key }, text));
  }
  select.value = value;
  return h("label", { class: style }, label, select);
}

const action = (id, label, onclick) => h("button", { type: "button", id, onclick }, label);

function check(label, value, change, properties = {}) {
  const box = h("input", { type: "checkbox", ...properties, onchange: () => change(box.checked) });
  box.checked = value;
  return h("label", { class: "check" }, box, label);
}

const caption = (...text) => h("figcaption", { class: "caption" }, h("b", { class: "figure-number" }), ...text);

// A region that scrolls, also by the keyboard.
const scroller = (label, style, ...children) =>
  h("div", { class: `scroll ${style}`, tabindex: "0", role: "region", "aria-label": label }, ...children);

// A resolved colour of the style sheet, for canvases, which do not know its variables.
function ink(variable) {
  const probe = h("i", { style: { color: `var(${variable})`, display: "none" } });
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

// The first of the texts that is no longer than its axis; the last one is written smaller, then cut.
function axisTitle({ ctx, bbox }, axis, texts) {
  const room = (axis ? bbox.height : bbox.width) + 20 * devicePixelRatio;
  const long = (text) => ctx.measureText(text).width > room;
  let text = texts.find((item) => !long(item)) ?? texts.at(-1);
  for (let size = 12; size >= 9 && long(text); size--) ctx.font = `${size * devicePixelRatio}px system-ui, sans-serif`;
  while (long(text)) text = `${text.slice(0, -2)}…`;
  return text;
}

const chartAxis = (titles, options) => ({
  label: (plot, axis) => axisTitle(plot, axis, titles), labelSize: 26, labelFont: "13px system-ui, sans-serif", font: "12px system-ui, sans-serif",
  stroke: () => ink("--muted"), grid: { stroke: () => ink("--rule"), width: 1 }, ticks: { show: false }, ...options,
});

// Draws `options` and `data` into `host` as wide as it is, and again whenever its width changes.
function chart(host, ratio, limits, options, data) {
  const size = () => {
    const width = Math.max(host.clientWidth, 240);
    return { width, height: Math.round(Math.min(Math.max(width * ratio, limits[0]), limits[1])) };
  };
  host.replaceChildren();
  const drawn = new uPlot({ ...size(), ...options }, data, host);
  new ResizeObserver((_, observer) => {
    if (drawn.root.parentNode !== host) observer.disconnect(); // another chart took its place
    else if (size().width !== drawn.width) drawn.setSize(size());
  }).observe(host);
  return drawn;
}
