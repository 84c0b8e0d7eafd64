"use strict";
// Bars: the cost of each row of a model, its sections, and what AP50 is lost to.

const MILLI = 1e-3;

// bars: [[value, text, hollow?]], one under the other, on a common scale to `most`.
function bars(values, most, color) {
  return values.map(([value, text, hollow]) => h("div", { class: "track" },
    h("i", { class: hollow ? "hollow" : null, style: { "--fill": color, width: `${isNumber(value) && most > 0 ? Math.max((100 * value) / most, 0) : 0}%`, "min-width": value > 0 ? "2px" : "0" } }),
    h("span", {}, text)));
}

const timeText = (seconds) => (isNumber(seconds) ? plain(seconds / MILLI, 3) : "not timed");

class LayerCosts {
  constructor(report) {
    this.report = report;
    this.byBlock = false;
    this.host = h("div");
    this.controls = h("div", { class: "controls" });
    this.node = h("figure", { class: "figure" }, this.controls, this.host,
      h("figcaption", { class: "caption" }, h("b", { class: "figure-number" }),
        "Where a model's cost lies: MACs, traffic of all kernels, and time at batch 1: hollow what the roofline predicts, filled what was measured. A row is bound by memory where its arithmetic intensity stays below the device's ridge."));
  }

  draw() {
    const models = this.report.visible().filter((model) => model.row.cost);
    if (!models.includes(this.model)) [this.model] = models;
    if (!this.model) {
      this.controls.replaceChildren();
      this.host.replaceChildren(h("p", { class: "muted" }, "No row of the table has its costs counted."));
      return;
    }
    const { row } = this.model;
    const kinds = [["rows", "row of the model file"], ...(row.blocks ? [["blocks", "kind of block"]] : [])];
    const byBlock = this.byBlock && row.blocks !== null;
    this.controls.replaceChildren(
      choice("Model", models.map((model) => [String(model.index), model.name]), String(this.model.index),
        (index) => { this.model = this.report.models[Number(index)]; this.draw(); this.controls.querySelector("#layer-model").focus(); }, { id: "layer-model" }),
      choice("A bar for each", kinds, byBlock ? "blocks" : "rows",
        (kind) => { this.byBlock = kind === "blocks"; this.draw(); this.controls.querySelector("#layer-kind").focus(); }, { id: "layer-kind" }));
    const guidelines = row.cost.guidelines.length ? [h("h3", {}, "ShuffleNetV2's guidelines"), h("ul", {}, row.cost.guidelines.map((line) => h("li", {}, line)))] : [];
    this.host.replaceChildren(h("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "Costs, scrolls" },
      byBlock ? this.blocks(row.blocks) : this.layers(row.cost.layers)), ...guidelines);
  }

  table(id, heads, lines) {
    return h("table", { class: "bars", id }, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, lines));
  }

  // The bars that rows and blocks share: work, traffic, time and the bound.
  shared(item, work, most) {
    const ratio = isNumber(item.predicted) && isNumber(item.measured) && item.predicted > 0 ? `${plain(item.measured / item.predicted, 2)}×` : "";
    const { color } = this.model;
    return [
      h("td", { class: "bar" }, bars([[item[work], plain(item[work] / MEGA, 3)]], most[work], color)),
      h("td", { class: "bar" }, bars([[item.bytes, plain(item.bytes / MEGA, 3)]], most.bytes, color)),
      h("td", { class: "bar" }, bars([[item.predicted, timeText(item.predicted), true], [item.measured, timeText(item.measured)]], most.time, color)),
      h("td", { class: "num" }, ratio),
      h("td", {}, item.bound ? h("span", { class: `bound ${item.bound}` }, item.bound) : h("span", { class: "muted" }, "not timed")),
    ];
  }

  most(items, work) {
    const top = (values) => Math.max(0, ...values.filter(isNumber));
    return {
      [work]: top(items.map((item) => item[work])), bytes: top(items.map((item) => item.bytes)),
      time: top(items.flatMap((item) => [item.predicted, item.measured])),
    };
  }

  layers(layers) {
    const most = this.most(layers, "macs");
    return this.table("layer-table", ["#", "Block", "Section", "MACs, M", "Traffic, MB", "Predicted, measured, ms", "Ratio", "Bound by"], layers.map((layer) =>
      h("tr", {}, h("td", {}, String(layer.index)), h("th", { scope: "row" }, layer.block, layer.name ? h("span", { class: "muted" }, ` ${layer.name}`) : null),
        h("td", { class: "muted" }, layer.section), this.shared(layer, "macs", most))));
  }

  blocks(blocks) {
    const most = this.most(blocks, "flops");
    return this.table("block-table", ["Block", "Rows", "Kernels", "FLOPs, M", "Traffic, MB", "Predicted, measured, ms", "Ratio", "Bound by"], blocks.map((block) =>
      h("tr", {}, h("th", { scope: "row" }, block.block), h("td", {}, String(block.rows.length)), h("td", {}, String(block.kernels)), this.shared(block, "flops", most))));
  }
}

// A table of bars, a line for each model and a column for each of its parts.
function barMatrix(report, { id, parts, value, text, hint }) {
  const models = report.visible().filter((model) => parts.some((part) => isNumber(value(model, part))));
  if (!models.length) return h("p", { class: "muted" }, "No row of the table has these figures.");
  const most = Math.max(...models.flatMap((model) => parts.map((part) => value(model, part)).filter(isNumber)));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Bars, scrolls sideways" }, h("table", { class: "bars models", id },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Model"), parts.map((part) => h("th", { scope: "col" }, part)))),
    h("tbody", {}, models.map((model) => h("tr", {}, h("th", { scope: "row" }, marker(model), model.name), parts.map((part) =>
      h("td", { class: "bar", title: hint(model, part) }, bars([[value(model, part), text(value(model, part))]], most, model.color))))))));
}

class ErrorSplit {
  constructor(report) {
    this.report = report;
    const names = (part) => [...new Set(report.models.flatMap((model) => Object.keys(model.row.errors?.[part] ?? {})))];
    this.delta = names("delta");
    this.special = names("special");
    this.host = h("div");
    this.node = h("figure", { class: "figure" }, this.host, h("figcaption", { class: "caption" }, h("b", { class: "figure-number" }),
      "AP50 that would be gained if errors of one kind alone were repaired (TIDE, arXiv:2008.08115), mean over the seeds; the kinds do not add up. Hover a bar for how many there are."));
  }

  get empty() {
    return !this.delta.length;
  }

  draw() {
    const value = (model, part) => model.row.errors?.delta[part] ?? model.row.errors?.special[part];
    const hint = (model, part) => (isNumber(model.row.errors?.counts[part]) ? `${plain(model.row.errors.counts[part])} ${part === "missed" ? "true boxes" : "detections"}, mean over the seeds` : null);
    this.host.replaceChildren(barMatrix(this.report, {
      id: "error-table", parts: [...this.delta, ...this.special], value, hint, text: (number) => (isNumber(number) ? fixed(number, 3) : ""),
    }));
  }
}
