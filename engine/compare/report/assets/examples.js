"use strict";
// Validation pictures with the boxes of every model, side by side. A picture is in the file once.

const FIRST_CONFIDENCE = 0.25;

class Examples {
  constructor(report, examples) {
    this.report = report;
    this.examples = examples;
    this.confidence = FIRST_CONFIDENCE;
    this.picture = 0;
    this.colorsTell = report.classes.length <= COLORS.length; // else classes share a colour, and boxes bear names
    const legend = this.colorsTell ? report.classes.map((name, index) => h("li", {}, h("i", { class: "swatch", style: { background: COLORS[index] } }), name)) : [];
    this.host = h("div", { class: "strip", id: "example-strip" });
    const slider = h("input", { type: "range", min: "0.05", max: "0.95", step: "0.05", id: "example-confidence",
      oninput: () => { this.confidence = Number(slider.value); shown.textContent = fixed(this.confidence, 2); this.draw(); } });
    slider.value = String(this.confidence);
    const shown = h("output", {}, fixed(this.confidence, 2));
    this.node = h("figure", { class: "figure" },
      h("div", { class: "controls" },
        choice("Picture", examples.map((item, index) => [String(index), item.name]), "0",
          (index) => { this.picture = Number(index); this.draw(); }, { id: "example-picture" }),
        h("label", {}, h("span", {}, "Confidence from ", shown), slider)),
      h("ul", { class: "legend" }, legend),
      this.host,
      h("figcaption", { class: "caption" }, h("b", { class: "figure-number" }),
        "One picture of the validation split: the true boxes, then what each model finds in it. The number beside a name counts its boxes; hover a box for its class and score."));
  }

  get empty() {
    return !this.examples.length;
  }

  draw() {
    const example = this.examples[this.picture];
    const shown = this.report.visible().filter((model) => example.found[model.name]);
    this.host.replaceChildren(this.panel(example, example.truth, h("b", {}, "True boxes"), null),
      ...shown.map((model) => this.panel(example, example.found[model.name], model.name, model)));
  }

  panel(example, found, title, model) {
    const sure = found.boxes.map((_, index) => index).filter((index) => !found.scores || found.scores[index] >= this.confidence);
    const picture = svg("svg", { viewBox: `0 0 ${example.width} ${example.height}`, role: "img",
      "aria-label": `${example.name}, ${model ? model.name : "true boxes"}: ${sure.length} boxes` },
    svg("image", { href: example.picture, width: example.width, height: example.height }), ...sure.map((index) => this.box(example, found, index)));
    return h("figure", { "data-row": model ? model.index : "truth" }, picture,
      h("figcaption", {}, model ? marker(model) : null, h("span", {}, title, h("span", { class: "muted" }, ` ${sure.length}`))));
  }

  box(example, found, index) {
    const [left, top, right, bottom] = found.boxes[index];
    const label = found.labels[index];
    const name = this.report.classes[label] ?? `class ${label}`;
    const text = found.scores ? `${name} ${fixed(found.scores[index], 2)}` : name;
    const color = COLORS[label % COLORS.length];
    const unit = example.width / 240; // a panel is about 240 CSS pixels wide
    const area = svg("g", {}, svg("title", {}, text),
      svg("rect", { x: left, y: top, width: Math.max(right - left, 0), height: Math.max(bottom - top, 0), fill: "transparent", stroke: "#fff", "stroke-width": 2.6 * unit, "stroke-opacity": 0.75 }),
      svg("rect", { x: left, y: top, width: Math.max(right - left, 0), height: Math.max(bottom - top, 0), fill: "none", stroke: color, "stroke-width": 1.5 * unit }));
    const letters = this.colorsTell ? (found.scores ? fixed(found.scores[index], 2).slice(1) : "") : name;
    const wide = letters.length * 5.4 * unit;
    if (letters && right - left > wide && bottom - top > 14 * unit) {
      area.append(svg("rect", { x: left, y: top, width: wide + 3 * unit, height: 11 * unit, fill: color }),
        svg("text", { x: left + 2 * unit, y: top + 8.5 * unit, "font-size": 9 * unit, fill: "#fff" }, letters));
    }
    return area;
  }
}
