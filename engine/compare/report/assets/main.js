"use strict";
// Builds the page from the record embedded in it. Columns, cells, fronts and texts come with the record.

class Report {
  constructor(results, examples) {
    this.results = results;
    this.classes = results.protocol.data?.classes ?? [];
    this.models = results.rows.map((row, index) => ({
      index, row, name: row.name, baseline: row.name === results.baseline,
      color: COLORS[index % COLORS.length], shape: SHAPES[index % SHAPES.length],
    }));
    const typeset = (text) => text.replaceAll("-", "\u2212"); // a true minus sign
    this.columns = results.columns.map((column) => ({ ...column, cells: column.cells.map((cell) => (cell.value === null ? cell : {
      ...cell, value: cell.value / column.scale, sd: cell.sd === null ? null : cell.sd / column.scale,
      text: typeset(cell.text), spread: typeset(cell.spread),
    })) }));
    this.groups = [...new Set(this.columns.map((column) => column.group))];
    this.numeric = this.columns.filter((column) => column.cells.some((cell) => cell.value !== null));
    this.defaults = this.axes();
    this.table = new ResultsTable(this);
    this.pareto = this.numeric.length ? new ParetoChart(this) : { empty: true };
    this.parts = [
      ["results", "Results", "The most important numbers first; \u201cAll columns\u201d shows the others. Search and filters apply to every figure of this page.", this.table],
      ["pareto", "Trade-offs", "Any number against any other.", this.pareto],
      ["curves", "Training curves", null, new CurvesChart(this)],
      ["layers", "Cost by layer", "Why fewer FLOPs were, or were not, faster.", new LayerCosts(this)],
      ["errors", "Error analysis", null, new ErrorSplit(this)],
      ["examples", "Examples", null, new Examples(this, examples)],
      ["protocol", "Protocol", "The settings that all models share. Models with different protocols never share a table.", { node: protocolTables(results) }],
      ["commands", "Commands", "Each command repeats one run.", { node: commandList(this) }],
    ].filter(([, , , part]) => !part.empty);
  }

  column(path) {
    return this.columns.find((column) => column.path === path);
  }

  // For a select of columns.
  options() {
    return this.numeric.map((column) => [column.path, column.title, column.group]);
  }

  // The models that pass the filters, in the order of the table.
  shown() {
    return this.table.models;
  }

  // AP over latency where the record has both, else the nearest to it.
  axes() {
    const first = (...starts) => starts.map((start) => this.numeric.find(({ path }) => path.startsWith(start))?.path).find(Boolean);
    const x = first("latency.", "cost.flops") ?? this.numeric[0]?.path;
    return { x, y: first("accuracy.AP", x === "cost.flops" ? "cost.params" : "cost.flops") ?? x };
  }

  refresh() {
    for (const [, , , part] of this.parts) part.draw?.();
  }

  show() {
    const main = document.getElementById("main");
    const contents = document.getElementById("contents");
    this.parts.forEach(([id, title, lead, part], index) => {
      main.append(h("section", { id, "aria-labelledby": `${id}-title` },
        h("h2", { id: `${id}-title` }, h("span", { class: "number" }, index + 1), title), lead ? h("p", { class: "lead" }, lead) : null, part.node));
      contents.append(h("a", { href: `#${id}` }, title));
    });
    main.querySelectorAll(".figure-number").forEach((node, index) => { node.textContent = `Figure ${index + 1}. `; });
    document.getElementById("lead").textContent = this.results.lead;
    document.getElementById("facts").append(...this.results.summary.map(({ name, value, detail }) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, h("b", {}, value), detail ? h("small", {}, detail) : null))));
    this.refresh();
  }
}

// System, light and dark in turn; the canvases are drawn again in the new colours.
function themeSwitch(report) {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  let index = 0;
  const apply = (theme) => {
    root.dataset.theme = theme;
    report.refresh();
  };
  button.addEventListener("click", () => {
    index = (index + 1) % themes.length;
    button.textContent = `Colours: ${themes[index]}`;
    apply(themes[index]);
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
    apply(themes[index]);
  });
}

const embedded = (id) => JSON.parse(document.getElementById(id).textContent);
const report = new Report(embedded("results-json"), embedded("examples-json"));
report.show();
themeSwitch(report);
