"use strict";
// Training curves: a line for each run in the colour of its row.

const FIRST_CURVE = "metrics/mAP_0.5:0.95";
const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3]]; // of the seeds in turn

class CurvesChart {
  constructor(report) {
    this.report = report;
    this.off = new Set();
    this.models = report.models.filter((model) => model.row.runs.some((run) => run.curves.epoch?.length));
    this.names = [...new Set(this.models.flatMap((model) => model.row.runs.flatMap((run) => Object.keys(run.curves))))]
      .filter((name) => name !== "epoch");
    this.name = this.names.includes(FIRST_CURVE) ? FIRST_CURVE : this.names[0];
    this.host = h("div", { class: "plot", id: "curves-plot", role: "img" });
    this.legend = h("ul", { class: "legend", id: "curves-legend" });
    this.node = h("figure", { class: "figure" },
      h("div", { class: "controls" }, choice("Curve", this.names.map((name) => [name, name]), this.name,
        (name) => { this.name = name; this.draw(); }, { id: "curves-name" })),
      this.host, this.legend,
      h("figcaption", { class: "caption" }, h("b", { class: "figure-number" }),
        "One line for each run; the seeds of a row share its colour and differ by their dashes. The numbers are the mean over the seeds at the pointer, or the last ones. Drag to enlarge, double-click to go back."));
    new ResizeObserver(() => this.resize()).observe(this.host);
  }

  get empty() {
    return !this.models.length;
  }

  draw() {
    const shown = new Set(this.report.visible());
    this.lines = this.models.filter((model) => shown.has(model)).flatMap((model) =>
      model.row.runs.map((run, index) => ({ model, run, index, values: run.curves[this.name] })).filter((line) => line.values));
    const epochs = [...new Set(this.lines.flatMap((line) => line.run.curves.epoch))].sort((a, b) => a - b);
    const data = [epochs, ...this.lines.map(({ run, values }) => {
      const known = new Map(run.curves.epoch.map((epoch, place) => [epoch, values[place]]));
      return epochs.map((epoch) => known.get(epoch) ?? null);
    })];
    this.data = data;
    this.chart?.destroy();
    this.chart = null;
    this.host.replaceChildren();
    this.host.setAttribute("aria-label", `${this.name} over the epochs, one line for each run`);
    if (this.lines.length) this.build(data);
    this.drawLegend();
  }

  build(data) {
    const few = data[0].length < 30;
    this.chart = new uPlot({
      ...this.size(),
      legend: { show: false },
      cursor: { y: false, points: { size: 6 }, drag: { x: true, y: false } },
      scales: { x: { time: false } },
      axes: [chartAxis("epoch", () => 8, {
        size: 32,
        splits: (_, __, min, max) => splits(false, min, max, Math.max(3, Math.round(this.host.clientWidth / 90))).filter(Number.isInteger),
      }), chartAxis(this.name, () => 6, { size: 54 })],
      series: [{}, ...this.lines.map(({ model, run, index }) => ({
        label: `${model.name}, seed ${run.seed}`, stroke: model.color, width: 1.6, dash: DASHES[index % DASHES.length],
        points: { show: few, size: 4 }, show: !this.off.has(model.index), spanGaps: true,
      }))],
      hooks: { setCursor: [() => this.readout()] },
    }, data, this.host);
  }

  drawLegend() {
    const models = [...new Set(this.lines.map((line) => line.model))];
    this.legend.replaceChildren(...models.map((model) => h("li", {}, h("button", {
      type: "button", "aria-pressed": String(!this.off.has(model.index)), title: "Show or hide",
      onclick: () => {
        if (!this.off.delete(model.index)) this.off.add(model.index);
        this.draw();
        this.legend.querySelector(`[data-row="${model.index}"]`)?.closest("button").focus();
      },
    }, marker(model), model.name, h("output", { "data-row": model.index })))));
    this.readout();
  }

  readout() {
    const place = this.chart?.cursor.idx ?? (this.data[0].length - 1);
    for (const output of this.legend.querySelectorAll("output")) {
      const values = this.lines.map((line, index) => (line.model.index === Number(output.dataset.row) ? this.data[index + 1][place] : null)).filter(isNumber);
      output.textContent = values.length ? (values.reduce((a, b) => a + b) / values.length).toPrecision(3) : "";
    }
  }

  size() {
    const width = Math.max(this.host.clientWidth, 240);
    return { width, height: Math.round(Math.min(Math.max(width * 0.4, 260), 400)) };
  }

  resize() {
    if (this.chart && this.size().width !== this.chart.width) this.chart.setSize(this.size());
  }
}
