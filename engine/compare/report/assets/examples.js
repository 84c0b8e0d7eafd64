"use strict";
// Validation images with the boxes of every model, side by side. Each image is in the file once.

class Examples {
  constructor(report, examples) {
    this.report = report;
    this.examples = examples;
    this.empty = !examples.length;
    this.confidence = 0.25;
    this.index = 0;
    this.colored = report.classes.length <= COLORS.length; // else classes share a colour, and boxes bear names
    const legend = this.colored ? report.classes.map((name, index) => h("li", {}, h("i", { class: "swatch", style: { background: COLORS[index] } }), name)) : [];
    this.host = h("div", { class: "strip", id: "example-strip" });
    const shown = h("output", {}, this.confidence.toFixed(2));
    const slider = h("input", { type: "range", min: "0.05", max: "0.95", step: "0.05", value: this.confidence, id: "example-confidence",
      oninput: () => { this.confidence = Number(slider.value); shown.textContent = this.confidence.toFixed(2); this.draw(); } });
    this.node = h("figure", { class: "figure" },
      h("div", { class: "controls" },
        choice("Image", examples.map((item, index) => [index, item.name]), 0, (index) => { this.index = index; this.draw(); }, { id: "example-image" }),
        h("label", {}, h("span", {}, "Confidence threshold ", shown), slider)),
      h("ul", { class: "legend" }, legend),
      this.host,
      caption("One image of the validation split: the ground truth, then the detections of each model. The number after a name counts its boxes. Hover over a box for its class and score."));
  }

  draw() {
    const example = this.examples[this.index];
    const models = this.report.shown().filter((model) => example.detections[model.name]);
    this.host.replaceChildren(this.panel(example, example.ground_truth, null),
      ...models.map((model) => this.panel(example, example.detections[model.name], model)));
  }

  panel(example, { boxes, labels, scores }, model) {
    const kept = [...boxes.keys()].filter((index) => !scores || scores[index] >= this.confidence);
    const image = svg("svg", { viewBox: `0 0 ${example.width} ${example.height}`, role: "img",
      "aria-label": `${example.name}, ${model ? model.name : "ground truth"}: ${kept.length} boxes` },
    svg("image", { href: example.image, width: example.width, height: example.height }),
    ...kept.map((index) => this.box(example.width / 240, boxes[index], labels[index], scores?.[index])));
    return h("figure", {}, image, h("figcaption", {}, model ? [marker(model), model.name] : h("b", {}, "Ground truth"),
      h("span", { class: "muted" }, `\u00a0${kept.length}`)));
  }

  // pixel: of the image, as one CSS pixel of a panel, which is about 240 wide
  box(pixel, [left, top, right, bottom], label, score) {
    const name = this.report.classes[label] ?? `class ${label}`;
    const number = score === undefined ? "" : score.toFixed(2);
    const color = COLORS[label % COLORS.length];
    const frame = (stroke, width) => svg("rect", { x: left, y: top, width: Math.max(right - left, 0), height: Math.max(bottom - top, 0),
      fill: "transparent", stroke, "stroke-width": width * pixel });
    const node = svg("g", {}, svg("title", {}, `${name} ${number}`), frame("#fffb", 2.6), frame(color, 1.5));
    const letters = this.colored ? number.slice(1) : name;
    const width = letters.length * 5.4 * pixel;
    if (letters && right - left > width && bottom - top > 14 * pixel) {
      node.append(svg("rect", { x: left, y: top, width: width + 3 * pixel, height: 11 * pixel, fill: color }),
        svg("text", { x: left + 2 * pixel, y: top + 8.5 * pixel, "font-size": 9 * pixel, fill: "#fff" }, letters));
    }
    return node;
  }
}
