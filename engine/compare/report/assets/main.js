"use strict";
// Puts the page together from the records embedded in it.

class Report {
  constructor(results, examples) {
    this.results = results;
    this.classes = results.protocol.data?.classes ?? [];
    this.models = results.rows.map((row, index) => ({
      index, row, name: row.name, baseline: row.name === results.baseline,
      color: COLORS[index % COLORS.length], shape: SHAPES[index % SHAPES.length],
    }));
    this.figures = new Map();
    this.columns = allColumns(results);
    this.groups = [...new Set(this.columns.map((item) => item.group))];
    this.numeric = this.columns.filter((item) => this.models.some((model) => this.figure(model, item).value !== null));
    this.defaults = this.axes();
    this.table = new ResultsTable(this);
    const pareto = this.numeric.length ? new ParetoChart(this) : { empty: true };
    this.charts = [pareto, new CurvesChart(this), new LayerCosts(this), new ErrorSplit(this), new Examples(this, examples)];
  }

  column(key) {
    return this.columns.find((item) => item.key === key);
  }

  figure(model, item) {
    const key = `${model.index} ${item.key}`;
    if (!this.figures.has(key)) this.figures.set(key, readFigure(model, item));
    return this.figures.get(key);
  }

  visible() {
    return this.table.shown;
  }

  // AP over latency where there are both, else the nearest to it that this record has.
  axes() {
    const has = (key) => this.numeric.some((item) => item.key === key);
    const first = (...keys) => keys.find(has) ?? this.numeric[0]?.key;
    const timed = this.numeric.find((item) => item.key.startsWith("latency."))?.key;
    const x = timed ?? first("cost.flops");
    return { x, y: first("accuracy.AP", ...(x === "cost.flops" ? [] : ["cost.flops"]), "cost.params") };
  }

  refresh() {
    for (const chart of this.charts) if (!chart.empty) chart.draw();
  }

  show() {
    const [pareto, curves, layers, errors, examples] = this.charts;
    const parts = [
      ["results", "Results", "Every figure of every row. The filters below act on all figures of this page.", this.table],
      ["pareto", "Trade-offs", "Any figure against any other; the front is computed anew for each choice.", pareto],
      ["curves", "Training curves", null, curves],
      ["layers", "Where the cost lies", "Why fewer FLOPs were, or were not, faster.", layers],
      ["errors", "What AP is lost to", null, errors],
      ["examples", "Examples", null, examples],
      ["protocol", "Protocol", "What all rows share; rows of different protocols never stand in one table.", { node: protocolTables(this.results) }],
      ["commands", "Commands", "What repeats each row.", { node: commandList(this) }],
    ].filter(([, , , part]) => !part.empty);
    this.charts = this.charts.filter((chart) => parts.some(([, , , part]) => part === chart));
    const main = document.getElementById("main");
    const contents = document.getElementById("contents");
    parts.forEach(([id, title, lead, part], index) => {
      const node = section(id, title, lead);
      node.querySelector("h2").prepend(h("span", { class: "number" }, String(index + 1)));
      node.append(part.node);
      main.append(node);
      contents.append(h("a", { href: `#${id}` }, title));
    });
    main.querySelectorAll(".figure-number").forEach((node, index) => { node.textContent = `Figure ${index + 1}. `; });
    document.getElementById("standfirst").textContent = standfirst(this);
    document.getElementById("facts").append(...facts(this));
    this.table.draw();
    this.refresh();
  }
}

// System, light, dark in turn; the canvases take their colours anew.
function themeSwitch(report) {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const turns = ["system", "light", "dark"];
  let place = 0;
  const apply = (theme) => {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
    report.refresh();
  };
  button.addEventListener("click", () => {
    place = (place + 1) % turns.length;
    button.textContent = `Colours: ${turns[place]}`;
    button.setAttribute("aria-label", `Colours: ${place ? turns[place] : "as the system"}`);
    apply(turns[place]);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => report.refresh());
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    report.table.layOut();
    apply("light");
  });
  addEventListener("afterprint", () => {
    delete root.dataset.print;
    report.table.paper.replaceChildren();
    apply(turns[place]);
  });
}

const embedded = (id) => JSON.parse(document.getElementById(id).textContent);
const report = new Report(embedded("results-json"), embedded("examples-json"));
report.show();
themeSwitch(report);
