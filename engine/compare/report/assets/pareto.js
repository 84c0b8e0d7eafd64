"use strict";
// The chart of any column against any other, with the Pareto front of the record.

class ParetoChart {
  constructor(report) {
    this.report = report;
    this.axes = { ...report.defaults };
    this.log = null; // null: as the range asks
    this.errors = true;
    this.names = true;
    this.host = h("div", { class: "plot", id: "pareto-plot" });
    this.list = h("p", { class: "front-list", id: "pareto-front", "aria-live": "polite" });
    this.missing = h("p", { class: "status", id: "pareto-missing" });
    this.card = h("aside", { class: "card", id: "pareto-card", "aria-label": "The selected model" });
    const pick = (axis) => (path) => { this.axes[axis] = path; this.log = null; this.draw(); };
    const turn = (name) => (value) => { this[name] = value; this.draw(); };
    const select = (axis) => choice(`${axis.toUpperCase()} axis`, report.options(), this.axes[axis], pick(axis), { id: `pareto-${axis}` });
    this.logBox = check("log x", false, turn("log"), { id: "pareto-log" });
    this.node = h("div", { class: "pareto" },
      h("figure", { class: "figure" },
        h("div", { class: "controls" }, select("x"), select("y"), h("div", { class: "row checks" }, this.logBox,
          check("error bars", true, turn("errors"), { id: "pareto-errors" }), check("names", true, turn("names"), { id: "pareto-names" }), action("export-png", "PNG", () => saveChart(this.plot, this.host)))),
        this.host, this.list, this.missing,
        caption("Each marker is a model; the ring marks the baseline. The dashed line is the Pareto front of all models of the comparison: no other model is at least as good in both numbers and better in one. Bars are one standard deviation over the seeds. Drag to zoom, double-click to reset.")),
      this.card);
  }

  draw() {
    const [x, y] = [this.report.column(this.axes.x), this.report.column(this.axes.y)];
    const { fronts } = this.report.results;
    const front = fronts[x.path]?.[y.path] ?? fronts[y.path]?.[x.path] ?? [];
    const models = this.report.shown();
    const read = (model) => ({ model, x: x.cells[model.index], y: y.cells[model.index], leads: front.includes(model.index) });
    this.points = models.map(read).filter((point) => point.x.value !== null && point.y.value !== null)
      .sort((a, b) => a.x.value - b.x.value || a.y.value - b.y.value);
    const absent = models.map(read).filter((point) => point.x.value === null || point.y.value === null)
      .map(({ model, ...point }) => `${model.name} (${(point.x.value === null ? point.x : point.y).text})`);
    this.front = this.points.filter((point) => point.leads);
    this.list.replaceChildren(h("b", {}, "Pareto front: "), this.front.map((point) => point.model.name).join(", ") || "none of these models");
    this.missing.textContent = absent.length ? `Not drawn: ${absent.join("; ")}.` : "";
    const values = (axis) => this.points.flatMap((point) => [point[axis].value, ...this.bar(point[axis])]);
    const positive = this.points.length > 0 && Math.min(...values("x")) > 0;
    const log = positive && (this.log ?? Math.max(...values("x")) / Math.min(...values("x")) > 8);
    Object.assign(this.logBox.querySelector("input"), { checked: log, disabled: !positive });
    if (this.points.length) this.build(x, y, extent(values("x"), log), extent(values("y"), false), log);
    else this.host.replaceChildren(h("p", { class: "muted" }, "No model in the table has both numbers."));
    this.choose(this.points.some((point) => point.model === this.chosen) ? this.chosen : null);
  }

  bar({ value, sd }) {
    return this.errors && isNumber(sd) ? [value - sd, value + sd] : [];
  }

  build(x, y, [left, right], rangeY, log) {
    const lower = x.better === "lower";
    const label = ({ title, better, label, note }) => [`${title} (${better} is better)`, title, [label, note].filter(Boolean).join(", ")];
    // The line ends where x is worst: from the last model of the front on, nothing better is known.
    const heights = this.points.map((point) => (point.leads ? point.y.value : null));
    const known = heights.filter((value) => value !== null);
    const steps = lower ? [null, ...heights, known.at(-1) ?? null] : [known[0] ?? null, ...heights, null];
    this.plot = chart(this.host, 0.58, [300, 460], {
      legend: { show: false },
      cursor: { x: false, y: false, points: { show: false }, drag: { x: true, y: true, uni: 20 } },
      scales: { x: { time: false, distr: log ? 3 : 1 }, y: { range: () => rangeY } },
      axes: [chartAxis(label(x), { size: 32, space: 70 }), chartAxis(label(y), { size: 56 })],
      series: [{}, { paths: () => null, points: { show: false } }, {
        stroke: () => ink("--muted"), width: 1.4, dash: [5, 4], spanGaps: true, points: { show: false },
        paths: uPlot.paths.stepped({ align: lower ? 1 : -1 }),
      }],
      hooks: { draw: [(plot) => { this.drawBars(plot); this.place(plot); }] },
    }, [[left, ...this.points.map((point) => point.x.value), right], [null, ...this.points.map((point) => point.y.value), null], steps]);
    Object.assign(this.host.dataset, { x: x.path, y: y.path });
  }

  drawBars({ ctx, bbox, valToPos }) {
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.setLineDash([]);
    ctx.lineWidth = 1.3 * devicePixelRatio;
    const cap = 3.5 * devicePixelRatio;
    for (const { model, x, y } of this.points) {
      const [across, up] = [valToPos(x.value, "x", true), valToPos(y.value, "y", true)];
      const [from, to] = this.bar(x).map((value) => valToPos(value, "x", true));
      const [low, high] = this.bar(y).map((value) => valToPos(value, "y", true));
      let path = from === undefined ? "" : `M${from} ${up}H${to}M${from} ${up - cap}v${2 * cap}M${to} ${up - cap}v${2 * cap}`;
      if (low !== undefined) path += `M${across} ${low}V${high}M${across - cap} ${low}h${2 * cap}M${across - cap} ${high}h${2 * cap}`;
      ctx.strokeStyle = model.color;
      ctx.stroke(new Path2D(path));
    }
    ctx.restore();
  }

  // The Pareto front as upright and level rectangles without area: left, right, top, bottom.
  line(plot, width) {
    const lower = this.report.column(this.axes.x).better === "lower";
    const spots = this.front.map(({ x, y }) => [plot.valToPos(x.value, "x"), plot.valToPos(y.value, "y")]);
    if (!spots.length) return [];
    const ends = lower ? [...spots, [width, spots.at(-1)[1]]] : [[0, spots[0][1]], ...spots];
    return ends.slice(1).flatMap(([x, y], index) => {
      const [fromX, fromY] = ends[index];
      return [[fromX, x, ...(lower ? [fromY, fromY] : [y, y])], [...(lower ? [x, x] : [fromX, fromX]), Math.min(fromY, y), Math.max(fromY, y)]];
    });
  }

  // The markers are buttons over the canvas, so that keyboard and screen reader reach them. A name stands beside, above
  // or below its marker, where it covers no other name, no marker and no part of the Pareto front; else it is left out.
  place(plot) {
    const [width, height] = [plot.over.clientWidth, plot.over.clientHeight];
    plot.over.querySelectorAll(".point").forEach((node) => node.remove());
    const spots = this.points.map((point) => [plot.valToPos(point.x.value, "x"), plot.valToPos(point.y.value, "y")]);
    const inside = ([x, y]) => x >= 0 && x <= width && y >= 0 && y <= height;
    const taken = [...spots.map(([x, y]) => [x - 7, x + 7, y - 7, y + 7]), ...this.line(plot, width)];
    const free = ([left, right, top, bottom]) => left > 0 && right < width + 8 && top > 0 && bottom < height
      && !taken.some((other) => left < other[1] && right > other[0] && top < other[3] && bottom > other[2]);
    for (const index of [...this.points.keys()].filter((item) => inside(spots[item])).sort((a, b) => this.points[b].leads - this.points[a].leads)) {
      const [x, y] = spots[index];
      const node = this.button(this.points[index], x / width, y < height / 2);
      Object.assign(node.style, { left: `${x}px`, top: `${y}px` });
      plot.over.append(node);
      const tag = node.querySelector(".tag");
      const [wide, high] = [tag.offsetWidth, tag.offsetHeight];
      const places = [9, -9 - wide, -wide / 2, 3, -3 - wide].flatMap((start, at) => (at < 2 ? [-high / 2, 3, -3 - high] : [9, -9 - high]).map((from) => [start, from]));
      const place = places.find(([start, from]) => free([x + start, x + start + wide, y + from, y + from + high]));
      tag.hidden = !this.names || !place;
      if (tag.hidden) continue;
      taken.push([x + place[0], x + place[0] + wide, y + place[1], y + place[1] + high]);
      Object.assign(tag.style, { left: `${place[0] + 14}px`, top: `${place[1] + 14}px` }); // 14: half a button
    }
  }

  button({ model, x, y, leads }, across, below) {
    const line = (axis, cell) => `${this.report.column(this.axes[axis]).title}: ${cell.text} ${cell.spread}`;
    const text = [line("x", x), line("y", y), ...(leads ? ["on the Pareto front"] : [])];
    return h("button", {
      type: "button", class: leads ? "point" : "point dominated", "data-row": model.index, "aria-label": [model.name, ...text].join(", "),
      "aria-pressed": String(model === this.chosen), onclick: () => this.choose(model === this.chosen ? null : model),
    }, marker(model), h("span", { class: "tag" }, model.name),
    h("span", { class: below ? "tip below" : "tip", style: { "--across": across } }, h("b", {}, model.name), text.map((item) => h("span", {}, item))));
  }

  choose(model) {
    this.chosen = model;
    for (const node of this.host.querySelectorAll(".point")) node.setAttribute("aria-pressed", String(Number(node.dataset.row) === model?.index));
    this.report.table.mark(model);
    this.card.replaceChildren(...(model ? this.modelCard(model) : this.frontCard()));
  }

  modelCard(model) {
    return [h("h3", {}, marker(model), model.name), h("button", { type: "button", onclick: () => this.choose(null) }, "Back to the Pareto front"),
      ...this.report.groups.flatMap((group) => [h("h4", {}, group), h("dl", {},
        this.report.columns.filter((column) => column.group === group).flatMap(({ label, unit, note, cells }) => {
          const { text, spread } = cells[model.index];
          return [h("dt", {}, [label, note, unit].filter(Boolean).join(", ")), h("dd", {}, `${text} ${spread}`)];
        }))])];
  }

  frontCard() {
    const heads = ["Model", ...["x", "y"].map((axis) => this.report.column(this.axes[axis]).title)];
    return [h("h3", {}, "Pareto front"), h("table", {}, h("thead", {}, h("tr", {}, heads.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, this.front.map(({ model, x, y }) => h("tr", {}, h("th", { scope: "row" }, marker(model), model.name),
        [x, y].map(({ text, spread }) => h("td", {}, text, spread ? h("span", { class: "spread" }, spread) : null)))))),
    h("p", { class: "muted" }, "Select a marker in the chart to see all numbers of its model here.")];
  }
}

// The range of an axis, with some room at both ends.
function extent(values, log) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const factor = Math.max(high / low, 1.3) ** 0.09;
  const room = (high - low || Math.abs(high) || 1) * 0.09;
  return log ? [low / factor, high * factor] : [low - room, high + room];
}
