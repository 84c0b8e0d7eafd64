"use strict";
// The table of all rows: sorted by a click on a heading, filtered by words and by limits.

const FEW_CLASSES = 4; // more have their figures hidden at first
const QUIET_GROUPS = ["AP50 by class", "AP50 lost to", "Cost by section", "Guidelines G1 to G4"];

class ResultsTable {
  constructor(report) {
    this.report = report;
    this.sorting = null; // {key, down}
    this.words = "";
    this.limits = [];
    this.hidden = new Set(QUIET_GROUPS.filter((group) => report.groups.includes(group)));
    if (report.columns.filter((item) => item.group === "AP by class").length > FEW_CLASSES) this.hidden.add("AP by class");
    this.count = h("p", { class: "status", id: "row-count", role: "status" });
    this.chips = h("div", { class: "chips", "aria-label": "Limits in force" });
    this.body = h("tbody");
    this.table = h("table", { class: "results", id: "results-table" },
      h("caption", { class: "hidden-text" }, "All rows of the comparison; headings sort"), this.head(), this.body);
    this.scroll = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of results, scrolls sideways" }, this.table);
    this.paper = h("div", { class: "on-paper" });
    this.scroll.classList.add("on-screen");
    this.node = h("div", {}, this.filters(), this.chips, this.groupBoxes(), this.count, this.scroll, this.paper, this.caption());
  }

  caption() {
    return h("p", { class: "caption" }, h("b", {}, "Table 1. "),
      "Mean ± standard deviation over the seeds; costs are of one image, FLOPs = 2 · MACs. Δ is the difference to the baseline with the interval of a paired bootstrap over images; * and colour mark one that leaves out 0. The best figure of a column is bold. Hover a figure for its seeds.");
  }

  head() {
    const groups = h("tr", {}, h("td", { class: "name corner" }));
    const heads = h("tr", {}, this.heading({ key: "name", label: "Model", unit: "" }, "name"));
    let previous = null;
    for (const item of this.report.columns) {
      const start = item.group !== previous;
      if (start) {
        const span = this.report.columns.filter((other) => other.group === item.group).length;
        groups.append(h("th", { scope: "colgroup", colspan: span, class: "group-start", "data-group": item.group }, h("span", {}, item.group)));
      }
      heads.append(this.heading(item, start ? "num group-start" : "num"));
      previous = item.group;
    }
    return h("thead", {}, groups, heads);
  }

  heading(item, style) {
    const under = [item.unit, item.note].filter(Boolean).join(", ");
    return h("th", { scope: "col", class: style, "aria-sort": "none", "data-key": item.key, "data-group": item.group },
      h("button", { type: "button", title: item.long ?? "", onclick: () => this.sort(item.key) }, item.label),
      under ? h("span", { class: "unit" }, under) : null);
  }

  filters() {
    const search = h("input", { type: "search", id: "filter-words", placeholder: "name, status, file, cause …",
      oninput: () => { this.words = search.value; this.refresh(); } });
    const options = this.report.numeric.map((item) => [item.key, item.long, item.group]);
    const selected = { key: this.report.defaults.y, sign: "≥" };
    const number = h("input", { type: "number", step: "any", id: "limit-value", "aria-label": "Limit" });
    const add = () => {
      if (number.value === "") return number.focus();
      this.limits.push({ ...selected, value: Number(number.value) });
      number.value = "";
      return this.refresh();
    };
    number.addEventListener("keydown", (event) => { if (event.key === "Enter") add(); });
    const words = h("label", { class: "grow" }, "Rows with the words", search);
    const bar = { class: "controls", role: "search", "aria-label": "Filter the rows" };
    if (!options.length) return h("div", bar, words);
    return h("div", bar, words,
      choice("Only rows with", options, selected.key, (key) => { selected.key = key; }, { id: "limit-key" }),
      h("div", { class: "row" },
        choice("is", [["≥", "≥"], ["≤", "≤"]], "≥", (sign) => { selected.sign = sign; }, { id: "limit-sign" }),
        h("label", { class: "wide" }, "limit", number),
        h("div", { class: "field" }, "\u00a0", h("button", { type: "button", id: "limit-add", onclick: add }, "Add limit"))));
  }

  groupBoxes() {
    return h("div", { class: "controls", role: "group", "aria-label": "Columns" }, this.report.groups.map((group) =>
      check(group, !this.hidden.has(group), (on) => {
        if (on) this.hidden.delete(group); else this.hidden.add(group);
        this.hideColumns();
      }, { "data-columns": group })));
  }

  hideColumns() {
    for (const cell of this.table.querySelectorAll("[data-group]")) cell.hidden = this.hidden.has(cell.dataset.group);
  }

  sort(key) {
    const better = key === "name" ? "lower" : this.report.column(key).better;
    const first = better === "higher";
    if (this.sorting?.key !== key) this.sorting = { key, down: first };
    else if (this.sorting.down === first) this.sorting.down = !first;
    else this.sorting = null;
    this.refresh();
  }

  // The rows that pass words and limits, in the order of the table.
  rows() {
    const words = this.words.toLowerCase().split(/\s+/).filter(Boolean);
    const models = this.report.models.filter((model) => {
      const { row } = model;
      const text = [row.name, row.status, row.cause, ...Object.values(row.model ?? {}).flat()].join(" ").toLowerCase();
      return words.every((word) => text.includes(word)) && this.limits.every((limit) => this.within(model, limit));
    });
    if (!this.sorting) return models;
    const { key, down } = this.sorting;
    const value = (model) => (key === "name" ? model.name : this.report.figure(model, this.report.column(key)).value);
    return models.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is not there comes last
      const order = key === "name" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return down ? -order : order;
    });
  }

  within(model, { key, sign, value }) {
    const figure = this.report.figure(model, this.report.column(key)).value;
    return figure !== null && (sign === "≥" ? figure >= value : figure <= value);
  }

  draw() {
    const models = this.rows();
    this.shown = models;
    const best = new Map(this.report.numeric.map((item) => [item.key, this.best(item, models)]));
    this.body.replaceChildren(...models.map((model) => this.line(model, best)));
    for (const cell of this.table.querySelectorAll("thead [aria-sort]")) {
      const mine = this.sorting?.key === cell.dataset.key;
      cell.setAttribute("aria-sort", mine ? (this.sorting.down ? "descending" : "ascending") : "none");
    }
    this.count.textContent = `${models.length} of ${this.report.models.length} rows${models.length < this.report.models.length ? "; the figures below show the same rows" : ""}`;
    this.chips.replaceChildren(...this.limits.map((limit, index) =>
      h("button", { type: "button", title: "Remove this limit", onclick: () => { this.limits.splice(index, 1); this.refresh(); } },
        `${this.report.column(limit.key).long} ${limit.sign} ${plain(limit.value)} ✕`)));
    this.hideColumns();
  }

  best(item, models) {
    const values = models.map((model) => this.report.figure(model, item).value).filter((value) => value !== null);
    if (new Set(values).size < 2 || item.kind === "difference") return null;
    return item.better === "lower" ? Math.min(...values) : Math.max(...values);
  }

  line(model, best) {
    const { row } = model;
    const badges = [model.baseline ? h("span", { class: "badge" }, "baseline") : null,
      row.status === "done" ? null : h("span", { class: `badge ${row.status}` }, row.status)];
    const name = h("th", { scope: "row", class: "name" }, h("div", {}, marker(model), h("span", { class: "label" }, row.name), badges,
      row.cause ? h("span", { class: "cause" }, row.cause) : null));
    let previous = null;
    const cells = this.report.columns.map((item) => {
      const start = item.group !== previous;
      previous = item.group;
      return this.cell(this.report.figure(model, item), item, best.get(item.key), start);
    });
    return h("tr", { "data-row": model.index, class: model === this.marked ? "selected" : null }, name, cells);
  }

  cell(figure, item, best, start) {
    const style = ["num", start ? "group-start" : "", figure.value === null ? "absent" : "", figure.significant ? (figure.value > 0 ? "better" : "worse") : "",
      figure.value !== null && figure.value === best ? "best" : ""].filter(Boolean).join(" ");
    return h("td", { class: style, title: figure.hint, "data-group": item.group, "data-key": item.key, "data-path": figure.path,
      "data-value": figure.raw === null ? null : String(figure.raw) },
    h("span", { class: "figure-main" }, figure.main), figure.spread ? h("span", { class: "spread" }, ` ${figure.spread}`) : null);
  }

  // For paper: the shown groups one under the other, each with the models' names.
  layOut() {
    const groups = this.report.groups.filter((group) => !this.hidden.has(group));
    this.paper.replaceChildren(...groups.map((group) => {
      const copy = this.table.cloneNode(true);
      copy.removeAttribute("id");
      for (const cell of copy.querySelectorAll("[data-group]")) {
        if (cell.dataset.group !== group) cell.remove();
      }
      return copy;
    }));
  }

  mark(model) {
    this.marked = model;
    for (const line of this.body.children) line.classList.toggle("selected", Number(line.dataset.row) === model?.index);
  }

  refresh() {
    this.draw();
    this.report.refresh();
  }
}
