"use strict";
// The table of all models: sorted by a click on a heading, filtered by words and by limits.

const MAX_CLASSES = 4; // with more, their columns are hidden at first
const HIDDEN_GROUPS = ["AP50 by class", "AP50 lost to", "Cost by section", "Guidelines G1 to G4"];

class ResultsTable {
  constructor(report) {
    this.report = report;
    this.sorting = null; // { path, down }
    this.words = "";
    this.limits = [];
    this.hidden = new Set(HIDDEN_GROUPS);
    this.all = false; // else the essential columns alone
    if (report.columns.filter((column) => column.group === "AP by class").length > MAX_CLASSES) this.hidden.add("AP by class");
    this.count = h("p", { class: "status", id: "row-count", role: "status" });
    this.chips = h("div", { class: "chips", "aria-label": "Active filters" });
    this.body = h("tbody");
    this.table = h("table", { class: "results", id: "results-table" },
      h("caption", { class: "hidden-text" }, "All models of the comparison; click a heading to sort"), this.head(), this.body);
    this.paper = h("div", { class: "on-paper" });
    this.node = h("div", {}, this.filters(), this.chips, this.groupBoxes(), this.count,
      scroller("Table of results", "on-screen", this.table), this.paper,
      h("p", { class: "caption" }, h("b", {}, "Table 1. "),
        "Mean ± standard deviation over the seeds. Costs are per image, FLOPs = 2 · MACs. Δ is the difference from the baseline with the 95 % interval of a paired bootstrap over the images; an asterisk and colour mark an interval that excludes 0. The best number of a column is bold. Hover over a number for the values of its seeds."));
  }

  head() {
    const { columns, groups } = this.report;
    return h("thead", {},
      h("tr", {}, h("td", { class: "name corner" }), groups.map((group) => h("th", {
        scope: "colgroup", class: "group-start", "data-group": group, colspan: columns.filter((column) => column.group === group).length,
      }, h("span", {}, group)))),
      h("tr", {}, this.heading({ path: "name", label: "Model" }, "name"),
        columns.map((column) => this.heading(column, "num"))));
  }

  heading({ path, label, title, unit, note, group }, style) {
    const under = [unit, note].filter(Boolean).join(", ");
    return h("th", { scope: "col", class: style, "data-path": path, "data-group": group },
      h("button", { type: "button", title, onclick: () => this.sort(path) }, label),
      under ? h("span", { class: "unit" }, under) : null);
  }

  filters() {
    const search = h("input", { type: "search", id: "filter-words", placeholder: "name, status, file, cause …",
      oninput: () => { this.words = search.value; this.report.refresh(); } });
    const words = h("label", { class: "grow" }, "Search", search);
    const bar = { class: "controls", role: "search", "aria-label": "Filter the models" };
    if (!this.report.numeric.length) return h("div", bar, words);
    const limit = { path: this.report.defaults.y, sign: "≥" };
    const number = h("input", { type: "number", step: "any", id: "limit-value" });
    const add = () => {
      if (number.value !== "") this.limits.push({ ...limit, value: Number(number.value) });
      number.value = "";
      this.report.refresh();
    };
    number.addEventListener("keydown", (event) => { if (event.key === "Enter") add(); });
    return h("div", bar, words,
      choice("Filter by", this.report.options(), limit.path, (path) => { limit.path = path; }, { id: "limit-key" }),
      h("div", { class: "row" },
        choice("is", [["≥", "≥"], ["≤", "≤"]], "≥", (sign) => { limit.sign = sign; }, { id: "limit-sign" }),
        h("label", { class: "wide" }, "value", number),
        h("div", { class: "field" }, "\u00a0", h("button", { type: "button", id: "limit-add", onclick: add }, "Add filter"))));
  }

  groupBoxes() {
    const turn = (change) => (on) => { change(on); this.hideColumns(); };
    this.boxes = h("div", { class: "row checks", role: "group", "aria-label": "Groups of columns" }, this.report.groups.map((group) =>
      check(group, !this.hidden.has(group), turn((on) => this.hidden[on ? "delete" : "add"](group)), { "data-columns": group })));
    return h("div", { class: "controls", role: "group", "aria-label": "Columns" },
      check("All columns", this.all, turn((on) => { this.all = on; }), { id: "all-columns" }), this.boxes,
      h("div", { class: "row" }, action("export-csv", "CSV", () => saveText("table.csv", csvText(this))),
        action("export-latex", "LaTeX", () => saveText("table.tex", latexText(this)))));
  }

  columns() {
    return this.report.columns.filter((column) => (this.all ? !this.hidden.has(column.group) : column.essential));
  }

  hideColumns() {
    const shown = this.columns();
    const count = (group) => shown.filter((column) => column.group === group).length;
    const starts = new Set(shown.filter((column, index) => column.group !== shown[index - 1]?.group));
    for (const cell of this.table.querySelectorAll("[data-group]")) {
      const column = shown.find(({ path }) => path === cell.dataset.path);
      cell.hidden = cell.dataset.path ? !column : !count(cell.dataset.group);
      if (column) cell.classList.toggle("group-start", starts.has(column));
      else if (!cell.hidden) cell.colSpan = count(cell.dataset.group);
    }
    this.boxes.hidden = !this.all;
  }

  // The better end first, then the other end, then the order of the record.
  sort(path) {
    const first = path !== "name" && this.report.column(path).better === "higher";
    if (this.sorting?.path !== path) this.sorting = { path, down: first };
    else this.sorting = this.sorting.down === first ? { path, down: !first } : null;
    this.report.refresh();
  }

  // The models that pass words and limits, in the order of the table.
  select() {
    const words = this.words.toLowerCase().split(/\s+/).filter(Boolean);
    const value = (model, path) => this.report.column(path).cells[model.index].value;
    const within = (number, limit) => number !== null && (limit.sign === "≥" ? number >= limit.value : number <= limit.value);
    const models = this.report.models.filter((model) => {
      const { row } = model;
      const text = [row.name, row.status, row.cause, ...Object.values(row.model ?? {}).flat()].join(" ").toLowerCase();
      return words.every((word) => text.includes(word)) && this.limits.every((limit) => within(value(model, limit.path), limit));
    });
    if (!this.sorting) return models;
    const { path, down } = this.sorting;
    return models.sort((a, b) => {
      if (path === "name") return (down ? -1 : 1) * a.name.localeCompare(b.name, "en", { numeric: true });
      const [x, y] = [value(a, path), value(b, path)];
      if (x === null || y === null) return (x === null) - (y === null); // models without the number come last
      return down ? y - x : x - y;
    });
  }

  draw() {
    this.models = this.select();
    this.body.replaceChildren(...this.models.map((model) => this.line(model)));
    for (const cell of this.table.querySelectorAll("thead [data-path]")) {
      const mine = this.sorting?.path === cell.dataset.path;
      cell.setAttribute("aria-sort", mine ? (this.sorting.down ? "descending" : "ascending") : "none");
    }
    this.count.textContent = `${this.models.length} of ${this.report.models.length} models`;
    this.chips.replaceChildren(...this.limits.map((limit, index) =>
      h("button", { type: "button", title: "Remove this filter", onclick: () => { this.limits.splice(index, 1); this.report.refresh(); } },
        `${this.report.column(limit.path).title} ${limit.sign} ${limit.value} ✕`)));
    this.hideColumns();
  }

  line(model) {
    const { row } = model;
    const badge = (text) => h("span", { class: `badge ${text}` }, text);
    const name = h("th", { scope: "row", class: "name" }, h("div", {}, marker(model), h("span", { class: "label" }, row.name),
      model.baseline ? badge("baseline") : null, row.status === "done" ? null : badge(row.status),
      row.cause ? h("span", { class: "cause" }, row.cause) : null));
    return h("tr", { "data-row": model.index }, name,
      this.report.columns.map((column) => this.cell(column, column.cells[model.index])));
  }

  cell(column, cell) {
    const marks = ["num", cell.value === null ? "absent" : "", cell.best ? "best" : "", cell.significant ? (cell.value > 0 ? "better" : "worse") : ""];
    return h("td", { class: marks.filter(Boolean).join(" "), title: cell.hint || null, "data-group": column.group, "data-path": column.path },
      h("span", { class: "main" }, cell.text), cell.spread ? h("span", { class: "spread" }, ` ${cell.spread}`) : null);
  }

  // For paper: the essential columns, or the visible groups one below the other, each with the names of the models.
  layOut() {
    const groups = this.all ? new Set(this.columns().map(({ group }) => group)) : [null];
    this.paper.replaceChildren(...[...groups].map((group) => {
      const copy = this.table.cloneNode(true);
      copy.removeAttribute("id");
      for (const cell of copy.querySelectorAll("[data-group]")) if (group && cell.dataset.group !== group) cell.remove();
      return copy;
    }));
  }

  mark(model) {
    for (const line of this.body.children) line.classList.toggle("selected", Number(line.dataset.row) === model?.index);
  }
}
