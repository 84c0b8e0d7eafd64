"use strict";
// The chart of any figure against any other, and which rows no other row beats in both.

// Whether a is at least as good as b in both figures and better in one; signs: +1 higher is better.
function dominates(a, b, signs) {
  const gains = [signs[0] * (a.x - b.x), signs[1] * (a.y - b.y)];
  return Math.min(...gains) >= 0 && Math.max(...gains) > 0;
}

function paretoFront(points, signs) {
  return points
    .filter((point) => !points.some((other) => dominates(other, point, signs)))
    .sort((a, b) => a.x - b.x || a.y - b.y);
}

// The staircase through the front: between two neighbours the corner that both of them beat.
function staircase(front, signs) {
  const worse = (sign, a, b) => (sign > 0 ? Math.min(a, b) : Math.max(a, b));
  return front.flatMap((point, index) => {
    const next = front[index + 1];
    return next ? [point, { x: worse(signs[0], point.x, next.x), y: worse(signs[1], point.y, next.y) }] : [point];
  });
}

// Ticks of an axis: 1, 2, 5 of each decade where it is logarithmic and wide enough, else even steps.
function splits(log, min, max, most) {
  const found = [];
  if (log && max / min > 8) {
    for (let power = Math.floor(Math.log10(min)); power <= Math.log10(max); power++) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    const inside = found.filter((value) => value >= min * 0.999 && value <= max * 1.001);
    return inside.length > most ? inside.filter((value) => Number.isInteger(+Math.log10(value).toFixed(6))) : inside;
  }
  const raw = (max - min) / Math.max(most - 1, 1);
  const scale = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * scale).find((value) => value >= raw * 0.999);
  for (let value = Math.ceil(min / step - 1e-9) * step; value <= max + step * 1e-9; value += step) {
    found.push(+value.toPrecision(12));
  }
  return found;
}

function extent(values, log) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (log) {
    const ratio = Math.max(high / low, 1.3) ** 0.09;
    return [low / ratio, high * ratio];
  }
  const pad = (high - low || Math.abs(high) || 1) * 0.09;
  return [low - pad, high + pad];
}

const chartAxis = (label, most, options = {}) => ({
  label,
  labelSize: 26,
  labelFont: "13px system-ui, sans-serif",
  font: "12px system-ui, sans-serif",
  stroke: () => ink("--muted"),
  grid: { stroke: () => ink("--rule"), width: 1 },
  ticks: { show: false },
  values: (_, values) => tickTexts(values),
  splits: (chart, axis, min, max) =>
    splits(chart.scales[chart.axes[axis].scale].distr === 3, min, max, most()),
  filter: (_, values) => values,
  ...options,
});

class ParetoChart {
  constructor(report) {
    this.report = report;
    this.shown = { x: report.defaults.x, y: report.defaults.y };
    this.signs = { x: this.natural("x"), y: this.natural("y") };
    this.logarithmic = null; // null: as the range asks
    this.errors = true;
    this.labels = true;
    this.host = h("div", { class: "plot", id: "pareto-plot" });
    this.tip = h("div", { class: "tip", role: "status", hidden: true });
    this.list = h("p", { class: "front-list", id: "pareto-front", "aria-live": "polite" });
    this.missing = h("p", { class: "status", id: "pareto-missing" });
    this.card = h("aside", { class: "card", id: "pareto-card", "aria-label": "The chosen row" });
    this.controls = h("div", { class: "controls" });
    this.node = h("div", { class: "pareto" },
      h("figure", { class: "figure" }, this.controls, this.host, this.list, this.missing,
        h("figcaption", { class: "caption" }, h("b", { class: "figure-number" }),
          "Each sign is a row of the table; the ring marks the baseline. The dashed line is the Pareto front: the rows that no other row beats in both figures. Bars are one standard deviation over the seeds.")),
      this.card);
    this.buildControls();
    new ResizeObserver(() => this.resize()).observe(this.host);
  }

  column(axis) {
    return this.report.column(this.shown[axis]);
  }

  natural(axis) {
    return this.column(axis).better === "lower" ? -1 : 1;
  }

  buildControls() {
    const options = this.report.numeric.map((column) => [column.key, column.long, column.group]);
    const better = [["1", "higher"], ["-1", "lower"]];
    const pick = (axis) => (key) => {
      this.shown[axis] = key;
      this.signs[axis] = this.natural(axis);
      this.logarithmic = null;
      this.buildControls();
      this.draw();
      this.controls.querySelector(`#pareto-${axis}`).focus();
    };
    const turn = (axis) => (value) => { this.signs[axis] = Number(value); this.draw(); };
    const pair = (axis, label) => h("div", { class: "row" },
      choice(label, options, this.shown[axis], pick(axis), { id: `pareto-${axis}` }, "wide"),
      choice("better is", better, String(this.signs[axis]), turn(axis), { id: `pareto-${axis}-better`, "aria-label": `${label}: better is` }));
    const redraw = (name) => (value) => { this[name] = value; this.draw(); };
    this.logBox = check("log x", false, redraw("logarithmic"), { id: "pareto-log" });
    this.controls.replaceChildren(pair("x", "Across"), pair("y", "Up"), h("div", { class: "row checks" }, this.logBox,
      check("error bars", this.errors, redraw("errors"), { id: "pareto-errors" }),
      check("names", this.labels, redraw("labels"), { id: "pareto-labels" })));
  }

  // Points of the rows that the table shows and that have both figures.
  collect() {
    const [x, y] = [this.column("x"), this.column("y")];
    const points = [];
    const missing = [];
    for (const model of this.report.visible()) {
      const [across, up] = [this.report.figure(model, x), this.report.figure(model, y)];
      if (isNumber(across.value) && isNumber(up.value)) {
        points.push({ model, x: across.value, y: up.value, across, up });
      } else missing.push(`${model.name} (${(isNumber(across.value) ? up : across).text})`);
    }
    return { points, missing };
  }

  draw() {
    const { points, missing } = this.collect();
    this.points = points;
    const signs = [this.signs.x, this.signs.y];
    this.front = paretoFront(points, signs);
    const xs = points.flatMap((point) => [point.x, ...this.ends(point.x, point.across)]);
    const ys = points.flatMap((point) => [point.y, ...this.ends(point.y, point.up)]);
    const positive = points.length > 0 && xs.every((value) => value > 0);
    const log = positive && (this.logarithmic ?? Math.max(...xs) / Math.min(...xs) > 8);
    const box = this.logBox.querySelector("input");
    box.checked = log;
    box.disabled = !positive;
    this.list.replaceChildren(h("b", {}, "On the front: "), this.front.length
      ? this.front.map((point) => point.model.name).join(", ") : "none");
    this.missing.textContent = missing.length ? `Not drawn: ${missing.join("; ")}.` : "";
    this.chart?.destroy();
    this.chart = null;
    if (!points.length) {
      this.host.replaceChildren(h("p", { class: "muted" }, "No row of the table has both figures."));
      return;
    }
    this.build(points, extent(xs, log), extent(ys, false), log);
    if (!points.some((point) => point.model === this.chosen)) this.choose(null);
    else this.choose(this.chosen);
  }

  ends(value, figure) {
    return this.errors && isNumber(figure.sd) ? [value - figure.sd, value + figure.sd] : [];
  }

  size() {
    const width = Math.max(this.host.clientWidth, 240);
    return { width, height: Math.round(Math.min(Math.max(width * 0.58, 300), 460)) };
  }

  build(points, rangeX, rangeY, log) {
    this.overlay = svg("svg", { class: "overlay", "aria-hidden": "true" });
    this.host.replaceChildren();
    const axis = (name) => `${this.column(name).long} (${this.signs[name] > 0 ? "higher" : "lower"} is better)`;
    const size = this.size();
    this.chart = new uPlot({
      ...size,
      legend: { show: false },
      cursor: { show: false, drag: { x: false, y: false } },
      scales: { x: { time: false, distr: log ? 3 : 1, range: () => rangeX }, y: { range: () => rangeY } },
      axes: [chartAxis(axis("x"), () => Math.max(3, Math.round(this.host.clientWidth / 95)), { size: 32 }),
        chartAxis(axis("y"), () => 6, { size: 48 })],
      series: [{}, { points: { show: false }, paths: () => null }],
      hooks: { draw: [(chart) => { if (chart === this.chart) this.place(); }] } // not one that is gone,
    }, [points.map((point) => point.x), points.map((point) => point.y)], this.host);
    this.host.setAttribute("data-x", this.shown.x);
    this.host.setAttribute("data-y", this.shown.y);
    this.buttons = points.map((point) => this.button(point));
    this.chart.over.append(this.overlay, ...this.buttons, this.tip); // placed when uPlot has drawn
  }

  button(point) {
    const { model } = point;
    const leads = this.front.includes(point);
    const text = `${model.name}: ${this.column("x").long} ${point.across.text}, ${this.column("y").long} ${point.up.text}${leads ? ", on the front" : ""}`;
    const node = h("button", {
      type: "button", class: leads ? "point" : "point dominated", "data-row": model.index, "aria-label": text,
      "aria-pressed": String(model === this.chosen),
      onclick: () => this.choose(model === this.chosen ? null : model),
      onmouseenter: () => this.showTip(point), onmouseleave: () => { this.tip.hidden = true; },
      onfocus: () => this.showTip(point), onblur: () => { this.tip.hidden = true; },
    }, marker(model));
    if (this.labels) node.append(h("span", { class: "tag" }, model.name));
    return node;
  }

  showTip(point) {
    const line = (name, figure) => h("span", {}, `${this.column(name).long}: ${figure.text}`);
    this.tip.replaceChildren(h("b", {}, point.model.name), line("x", point.across), line("y", point.up));
    this.tip.hidden = false;
    const [x, y] = [this.chart.valToPos(point.x, "x"), this.chart.valToPos(point.y, "y")];
    const left = Math.min(Math.max(x - this.tip.offsetWidth / 2, -30), this.chart.over.clientWidth - this.tip.offsetWidth);
    const above = y - this.tip.offsetHeight - 16;
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${above < -10 ? y + 18 : above}px`;
  }

  // Puts front, bars and signs where the axes say; called after each drawing of the canvas.
  place() {
    if (!this.chart || !this.buttons) return;
    const spot = (x, y) => [this.chart.valToPos(x, "x"), this.chart.valToPos(y, "y")];
    const parts = [];
    const stairs = staircase(this.front, [this.signs.x, this.signs.y]);
    const path = stairs.map(({ x, y }) => spot(x, y).map((value) => value.toFixed(1)).join(" "));
    if (path.length) parts.push(svg("path", { class: "front", d: `M${path.join("L")}` }), ...this.edges(spot));
    for (const point of this.errors ? this.points : []) {
      const line = (from, to, caps) => {
        const [[x1, y1], [x2, y2]] = [spot(...from), spot(...to)];
        const [dx, dy] = caps;
        parts.push(svg("path", {
          class: "error", stroke: point.model.color, fill: "none",
          d: `M${x1} ${y1}L${x2} ${y2}M${x1 - dx} ${y1 - dy}L${x1 + dx} ${y1 + dy}M${x2 - dx} ${y2 - dy}L${x2 + dx} ${y2 + dy}`,
        }));
      };
      const [left, right] = this.ends(point.x, point.across);
      const [low, high] = this.ends(point.y, point.up);
      if (left !== undefined) line([left, point.y], [right, point.y], [0, 3.5]);
      if (low !== undefined) line([point.x, low], [point.x, high], [3.5, 0]);
    }
    this.overlay.replaceChildren(...parts);
    this.placeSigns(spot);
  }

  // From both ends of the front on: what it beats reaches to the edges of the chart.
  edges(spot) {
    const [wide, high] = [this.chart.over.clientWidth, this.chart.over.clientHeight];
    const leads = this.signs.x < 0; // the first of the front is the best across, the last the best up
    const [across, up] = leads ? [this.front[0], this.front.at(-1)] : [this.front.at(-1), this.front[0]];
    const [[x, y], [left, top]] = [spot(across.x, across.y), spot(up.x, up.y)];
    return [`M${x} ${y}V${this.signs.y > 0 ? high : 0}`, `M${left} ${top}H${leads ? wide : 0}`].map((d) => svg("path", { class: "edge", d }));
  }

  // A name stands right of its sign, left of it near the edge, and not at all where it would lie on another.
  placeSigns(spot) {
    const taken = this.points.map((point) => {
      const [x, y] = spot(point.x, point.y);
      return { left: x - 7, right: x + 7, top: y - 7, bottom: y + 7 };
    });
    const free = (box) => !taken.some((other) => box.left < other.right && box.right > other.left && box.top < other.bottom && box.bottom > other.top);
    const order = [...this.points.keys()].sort((a, b) => this.front.includes(this.points[b]) - this.front.includes(this.points[a]));
    for (const index of order) {
      const [x, y] = spot(this.points[index].x, this.points[index].y);
      const button = this.buttons[index];
      button.style.left = `${x}px`;
      button.style.top = `${y}px`;
      const tag = button.querySelector(".tag");
      if (!tag) continue;
      tag.hidden = false;
      const width = tag.offsetWidth;
      const right = { left: x + 9, right: x + 13 + width, top: y - 7, bottom: y + 7 };
      const left = { left: x - 13 - width, right: x - 9, top: y - 7, bottom: y + 7 };
      const fits = (box) => box.left > 0 && box.right < this.chart.over.clientWidth + 8 && free(box);
      const place = fits(right) ? right : fits(left) ? left : null;
      tag.classList.toggle("left", place === left);
      tag.hidden = place === null;
      if (place) taken.push(place);
    }
  }

  choose(model) {
    this.chosen = model;
    for (const button of this.buttons ?? []) {
      button.setAttribute("aria-pressed", String(model !== null && Number(button.dataset.row) === model?.index));
    }
    this.report.table.mark(model);
    if (!model) {
      this.card.replaceChildren(...this.frontCard());
      return;
    }
    const back = h("button", { type: "button", onclick: () => this.choose(null) }, "Back to the front");
    const parts = [h("h3", {}, marker(model), model.name), back];
    for (const group of this.report.groups) {
      const columns = this.report.columns.filter((column) => column.group === group);
      parts.push(h("h4", {}, group), h("dl", {}, columns.flatMap((column) =>
        [h("dt", {}, column.label + (column.unit ? ` (${column.unit})` : "")), h("dd", {}, this.report.figure(model, column).text)])));
    }
    this.card.replaceChildren(...parts);
  }

  frontCard() {
    const heads = ["Model", this.column("x").long, this.column("y").long].map((text) => h("th", { scope: "col" }, text));
    const lines = (this.front ?? []).map((point) => h("tr", {}, h("th", { scope: "row" }, marker(point.model), point.model.name),
      h("td", {}, point.across.text), h("td", {}, point.up.text)));
    return [h("h3", {}, "The front"), h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, lines)),
      h("p", { class: "muted" }, "Choose a sign in the chart to see all figures of its row here.")];
  }

  resize() {
    if (!this.chart) return;
    const size = this.size();
    if (size.width !== this.chart.width) this.chart.setSize(size);
  }
}
