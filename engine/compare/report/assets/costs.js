"use strict";
// Bars: the cost of each row of a model file, and the AP50 lost to each kind of error.

const MEGA = 1e6;
const MILLI = 1e-3;

// values: [[value, text, hollow?]], one below the other, on a common scale up to `max`.
function bars(values, max, color, hint = null) {
  return h("td", { class: "bar", title: hint }, values.map(([value, text, hollow]) => h("div", { class: "track" },
    h("i", { class: hollow ? "hollow" : null, style: { "--fill": color, width: `${value > 0 ? (100 * value) / max : 0}%`, "min-width": value > 0 ? "2px" : "0" } }),
    h("span", {}, text))));
}

function barTable(id, style, heads, lines) {
  return scroller("Bars", style === "models" ? "" : "tall", h("table", { class: `bars ${style}`, id },
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, lines.map((line) => h("tr", {}, line)))));
}

class LayerCosts {
  constructor(report) {
    this.report = report;
    this.kind = "layers";
    this.host = h("div");
    this.controls = h("div", { class: "controls" });
    this.node = h("figure", { class: "figure" }, this.controls, this.host,
      caption("Where the cost of a model lies: MACs or FLOPs, memory traffic of all kernels, and time at batch 1. Hollow bars are predicted by the roofline, filled bars are measured. A layer is memory-bound where its arithmetic intensity is below the ridge of the device."));
  }

  draw() {
    const models = this.report.shown().filter((model) => model.row.cost);
    if (!models.includes(this.model)) [this.model] = models;
    if (!this.model) {
      this.controls.replaceChildren();
      this.host.replaceChildren(h("p", { class: "muted" }, "No model in the table has computed costs."));
      return;
    }
    const { row } = this.model;
    const kinds = [["layers", "row of the model file"], ...(row.blocks ? [["blocks", "type of block"]] : [])];
    if (!row.blocks) this.kind = "layers";
    const redraw = (id) => { this.draw(); this.controls.querySelector(id).focus(); };
    this.controls.replaceChildren(
      choice("Model", models.map((model) => [model.index, model.name]), this.model.index,
        (index) => { this.model = this.report.models[index]; redraw("#layer-model"); }, { id: "layer-model" }),
      choice("One line per", kinds, this.kind, (kind) => { this.kind = kind; redraw("#layer-kind"); }, { id: "layer-kind" }));
    const guidelines = row.cost.guidelines.length ? [h("h3", {}, "ShuffleNetV2 guidelines"), h("ul", {}, row.cost.guidelines.map((line) => h("li", {}, line)))] : [];
    this.host.replaceChildren(this.kind === "blocks" ? this.blocks(row.blocks) : this.layers(row.cost.layers), ...guidelines);
  }

  layers(layers) {
    return this.table("layer-table", ["#", "Block", "Section"], "macs", "MACs, M", layers, (layer) => [
      h("td", {}, layer.index), h("th", { scope: "row" }, layer.block, h("span", { class: "muted" }, ` ${layer.name ?? ""}`)),
      h("td", { class: "muted" }, layer.section)]);
  }

  blocks(blocks) {
    return this.table("block-table", ["Block", "Rows", "Kernels"], "flops", "FLOPs, M", blocks, (block) => [
      h("th", { scope: "row" }, block.block), h("td", {}, block.rows.length), h("td", {}, block.kernels)]);
  }

  table(id, heads, work, workHead, items, start) {
    const max = (...keys) => Math.max(...items.flatMap((item) => keys.map((key) => item[key] ?? 0)));
    const scales = [max(work), max("bytes"), max("predicted", "measured")];
    const time = (seconds) => (isNumber(seconds) ? plain(seconds / MILLI, 3) : "not timed");
    const { color } = this.model;
    return barTable(id, "", [...heads, workHead, "Traffic, MB", "Predicted, measured, ms", "Ratio", "Bound by"], items.map((item) => [
      ...start(item),
      bars([[item[work], plain(item[work] / MEGA, 3)]], scales[0], color),
      bars([[item.bytes, plain(item.bytes / MEGA, 3)]], scales[1], color),
      bars([[item.predicted, time(item.predicted), true], [item.measured, time(item.measured)]], scales[2], color),
      h("td", { class: "num" }, item.predicted > 0 && isNumber(item.measured) ? `${plain(item.measured / item.predicted, 2)}×` : ""),
      h("td", {}, h("span", { class: item.bound ? `bound ${item.bound}` : "muted" }, item.bound ?? "not timed")),
    ]));
  }
}

class ErrorSplit {
  constructor(report) {
    this.report = report;
    this.columns = report.columns.filter((column) => column.path.startsWith("errors."));
    this.empty = !this.columns.length;
    this.host = h("div");
    this.node = h("figure", { class: "figure" }, this.host, caption(
      "AP50 gained if the errors of one kind alone were corrected (TIDE, arXiv:2008.08115), mean over the seeds. The kinds do not add up. Hover over a bar for the number of errors."));
  }

  draw() {
    const models = this.report.shown().filter((model) => model.row.errors);
    const max = Math.max(...models.flatMap((model) => this.columns.map((column) => column.cells[model.index].value)));
    const hint = ({ row }, kind) => {
      const count = row.errors.counts[kind];
      return isNumber(count) ? `${plain(count, 4)} ${kind === "missed" ? "ground-truth boxes" : "detections"}, mean over the seeds` : null;
    };
    this.host.replaceChildren(models.length
      ? barTable("error-table", "models", ["Model", ...this.columns.map((column) => column.label)], models.map((model) => [
        h("th", { scope: "row" }, marker(model), model.name),
        ...this.columns.map(({ cells, label }) => bars([[cells[model.index].value, cells[model.index].text]], max, model.color, hint(model, label))),
      ]))
      : h("p", { class: "muted" }, "No model in the table has an error analysis."));
  }
}
