"use strict";
// What is shown now as a file: the table as CSV or LaTeX, the chart as an image.

const LATEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "Δ": "$\\Delta$", "−": "$-$" };

const saveFile = (name, content) => h("a", { download: name, href: URL.createObjectURL(content) }).click();
const saveText = (name, text) => saveFile(name, new Blob([text], { type: "text/plain" }));

// All digits of each number, and its standard deviation where it has one. Spreadsheets take no text for a formula.
function csvText(table) {
  const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const lines = [["model"], ...table.models.map(({ name }) => [/^[=+\-@\t\r]/.test(name) ? `'${name}` : name])];
  for (const { csv, kind, cells, scale } of table.columns()) {
    const number = (value) => (isNumber(value) ? String(+(value * scale).toPrecision(15)) : "");
    const write = (head, key) => lines.forEach((line, index) => line.push(index ? number(cells[table.models[index - 1].index][key]) : head));
    write(csv, "value");
    if (kind === "spread") write(`${csv} sd`, "sd");
  }
  return lines.map((line) => `${line.map(quoted).join(",")}\n`).join("");
}

// A table for the package booktabs.
function latexText(table) {
  const escaped = (text) => text.replace(/[&%$#_{}\\~^±Δ−]/g, (sign) => LATEX[sign] ?? `\\${sign}`);
  const columns = table.columns();
  const line = (cells) => `${cells.join(" & ")} \\\\`;
  const heads = columns.map(({ label, note, unit }) => escaped([label, note, unit].filter(Boolean).join(", ")));
  const cells = ({ text, spread, best }) => (best ? `\\textbf{${escaped(text)}}` : escaped(text)) + (spread ? ` ${escaped(spread)}` : "");
  return [`\\begin{tabular}{l${"r".repeat(columns.length)}}`, "\\toprule", line(["Model", ...heads]), "\\midrule",
    ...table.models.map((model) => line([escaped(model.name), ...columns.map((column) => cells(column.cells[model.index]))])),
    "\\bottomrule", "\\end{tabular}", ""].join("\n");
}

// The canvas with the markers and names that lie over it.
function saveChart({ ctx: { canvas }, bbox }, host) {
  const pen = h("canvas", { width: canvas.width, height: canvas.height }).getContext("2d");
  Object.assign(pen, { fillStyle: ink("--paper"), font: "12px system-ui, sans-serif", textBaseline: "top" });
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(canvas, 0, 0);
  pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, bbox.left, bbox.top);
  for (const point of host.querySelectorAll(".point")) {
    const [shape, tag, path] = [point.querySelector("path"), point.querySelector(".tag"), new Path2D()];
    const [x, y, across, down] = [point, tag].flatMap(({ style }) => [parseFloat(style.left), parseFloat(style.top)]);
    path.addPath(new Path2D(shape.getAttribute("d")), new DOMMatrix([1, 0, 0, 1, x - 6, y - 6]));
    pen.fillStyle = shape.getAttribute("fill");
    pen.fill(path);
    pen.fillStyle = ink("--ink");
    if (!tag.hidden) pen.fillText(tag.textContent, x - 14 + across, y - 14 + down);
  }
  pen.canvas.toBlob((image) => saveFile("pareto.png", image));
}
