"use strict";
// Training curves: a line for each run in the colour of its row.

const FIRST_CURVE = "metrics/mAP_0.5:0.95";
const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3]]; // of the seeds in turn

class CurvesChart {
  constructor(report) {
    this.report = report;
    this.runs = report.models.flatMap((model) => model.row.runs.map((run, index) => ({ model, run, index })))
      .filter(({ run }) => run.curves.epoch?.length);
    this.empty = !this.runs.length;
    const names = [...new Set(this.runs.flatMap(({ run }) => Object.keys(run.curves)))].filter((name) => name !== "epoch");
    this.name = names.includes(FIRST_CURVE) ? FIRST_CURVE : names[0];
    this.host = h("div", { class: "plot", id: "curves-plot", role: "img" });
    this.node = h("figure", { class: "figure" },
      h("div", { class: "controls" }, choice("Curve", names.map((name) => [name, name]), this.name,
        (name) => { this.name = name; this.draw(); }, { id: "curves-name" })),
      this.host,
      caption("One line per run. The seeds of a model share its colour and differ by their dashes. The numbers are means over the seeds at the pointer, or at the last epoch. Click a name to hide it; drag to zoom, double-click to reset."));
  }

  draw() {
    const shown = this.report.shown();
    const lines = this.runs.filter(({ model, run }) => shown.includes(model) && run.curves[this.name]);
    this.host.setAttribute("aria-label", `${this.name} over the epochs, one line per run`);
    this.host.replaceChildren(h("p", { class: "muted" }, "No model in the table has this curve."));
    if (!lines.length) return;
    const epochs = [...new Set(lines.flatMap(({ run }) => run.curves.epoch))].sort((a, b) => a - b);
    const data = [epochs, ...lines.map(({ run }) => {
      const known = new Map(run.curves.epoch.map((epoch, index) => [epoch, run.curves[this.name][index]]));
      return epochs.map((epoch) => known.get(epoch) ?? null);
    })];
    const mean = (model, index) => {
      const values = data.slice(1).filter((_, line) => lines[line].model === model).map((column) => column[index]).filter(isNumber);
      return values.length ? (values.reduce((a, b) => a + b) / values.length).toPrecision(3) : "";
    };
    // The legend has one entry per model, that of its first line; it shows and hides the others, too.
    const first = lines.map(({ model }) => lines.findIndex((line) => line.model === model));
    const follow = (plot, index, { show }) => first.forEach((leader, line) => {
      if (show !== undefined && leader === index - 1 && line !== leader) plot.setSeries(line + 1, { show });
    });
    const plot = chart(this.host, 0.4, [260, 400], {
      legend: { markers: { fill: (plot, index) => plot.series[index].stroke() } },
      cursor: { y: false, points: { size: 6 } },
      scales: { x: { time: false } },
      axes: [chartAxis(["epoch"], { size: 32, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500] }), chartAxis([this.name], { size: 54 })],
      series: [{ label: "epoch", value: (_, value) => value ?? epochs.at(-1) }, ...lines.map(({ model, run, index }, line) => ({
        label: model.name, class: first[line] === line ? "model" : "seed", stroke: model.color, width: 1.6, spanGaps: true,
        dash: DASHES[index % DASHES.length], points: { show: epochs.length < 30, size: 4 },
        value: (_, __, ___, at) => mean(model, at ?? epochs.length - 1),
      }))],
      hooks: { setSeries: [follow] },
    }, data);
    for (const entry of plot.root.querySelectorAll(".u-legend .model th")) {
      Object.assign(entry, { tabIndex: 0, role: "button", onkeydown: (event) => { if (event.key === "Enter") entry.click(); } });
    }
  }
}
