"use strict";
// Protocol, commands and the head of the page.

function written(value) {
  if (value === null || value === "") return "none";
  if (Array.isArray(value)) return value.map(written).join(", ");
  if (typeof value === "object") return JSON.stringify(value);
  return String(value);
}

// A nested record as lines [path, value], one for each plain value or list.
function flatten(record, prefix = "") {
  return Object.entries(record).flatMap(([key, value]) => {
    const path = prefix ? `${prefix}.${key}` : key;
    const nested = value !== null && typeof value === "object" && !Array.isArray(value);
    return nested ? flatten(value, path) : [[path, value]];
  });
}

function protocolTables(results) {
  const { protocol, measurement } = results;
  const nested = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const table = (title, record) => h("table", { "data-protocol": title }, h("caption", {}, title), h("tbody", {}, flatten(record).map(([path, value]) =>
    h("tr", {}, h("th", { scope: "row" }, path), h("td", { "data-path": path }, written(value))))));
  const entries = Object.entries(protocol);
  const parts = [["general", Object.fromEntries(entries.filter(([, value]) => !nested(value)))],
    ...entries.filter(([, value]) => nested(value)), ["measurement", measurement ?? {}]];
  return h("div", { class: "protocol", id: "protocol-tables" },
    parts.filter(([, record]) => Object.keys(record).length).map(([title, record]) => table(title, record)));
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // no permission, as in some browsers for files: the older way
    const area = h("textarea", { "aria-hidden": "true", style: { position: "fixed", opacity: "0" } });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

function commandBlock(title, lines) {
  const text = lines.join("\n");
  const button = h("button", { type: "button", class: "copy", onclick: async () => {
    const done = await copyText(text);
    button.textContent = done ? "Copied" : "Select and copy";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  } }, "Copy");
  return h("div", { class: "command" }, h("p", {}, title), button, h("pre", { tabindex: "0" }, h("code", {}, text)));
}

function commandList(report) {
  const one = commandBlock("This comparison", [report.results.command]);
  const rows = report.models.map((model) => {
    const block = commandBlock([marker(model), model.name], model.row.runs.map((run) => run.command));
    block.setAttribute("data-row", model.index);
    const notes = [model.row.model?.source, ...(model.row.model?.notes ?? [])].filter(Boolean);
    if (notes.length) block.append(h("p", { class: "muted", style: { "font-weight": "400", "font-size": "0.82rem", "grid-column": "1 / -1" } }, notes.join(" · ")));
    return block;
  }).filter((_, index) => report.models[index].row.runs.length);
  return h("div", {}, one, rows);
}

const DIRTY = "-dirty";

// By which commits the runs were made, and what is wrong with that.
function codeFact(rows) {
  const made = rows.flatMap((row) => row.runs).filter((run) => run.status === "done");
  const commits = [...new Set(made.map((run) => run.environment?.commit || "unknown"))];
  const short = (commit) => commit.replace(DIRTY, "").slice(0, 12) + (commit.endsWith(DIRTY) ? DIRTY : "");
  const warnings = [
    commits.length > 1 ? `warning: ${commits.length} commits in one table` : "",
    commits.some((commit) => commit.endsWith(DIRTY)) ? "warning: uncommitted changes" : "",
  ].filter(Boolean);
  return ["Code", commits.map(short).join(", "), warnings.join("; ") || null];
}

function deviceText(device, threads) {
  return isNumber(threads) ? `${device}, ${threads} ${threads === 1 ? "thread" : "threads"}` : device;
}

// Where the runs were made, if that is not where the costs were measured.
function elsewhere({ protocol, measurement }) {
  const { device } = protocol;
  if (!measurement || !device) return null;
  const there = deviceText(device.name, device.threads);
  return there === deviceText(measurement.device, measurement.threads) ? null : there;
}

function facts(report) {
  const { results, models } = report;
  const { protocol, measurement } = results;
  const failed = models.filter((model) => model.row.status === "failed").length;
  const partly = models.filter((model) => model.row.status === "partly").length;
  const trouble = [failed ? `${failed} failed` : "", partly ? `${partly} in part` : ""].filter(Boolean).join(", ");
  const { data, training } = protocol;
  const items = [
    ["Models", models.length, trouble || "all complete"],
    ["Baseline", results.baseline ?? "none", null],
    ["Data set", data?.name, data ? [isNumber(data.train_images) ? `${plain(data.train_images)} to train` : "", isNumber(data.val_images) ? `${plain(data.val_images)} to validate` : ""].filter(Boolean).join(", ") : null],
    ["Image size", protocol.image_size ? `${written(protocol.image_size)} px` : null, null],
    ["Training", training?.epochs ? `${training.epochs} epochs` : null, protocol.seeds?.length ? `seeds ${written(protocol.seeds)}` : null],
    ["Device", measurement?.device ?? protocol.device?.name, [(measurement?.threads ?? protocol.device?.threads) ? `${measurement?.threads ?? protocol.device.threads} threads` : "", elsewhere(results) ? `runs on ${elsewhere(results)}` : ""].filter(Boolean).join("; ") || null],
    codeFact(results.rows),
    ["Roof", measurement?.roof ? `${plain(measurement.roof.flops_per_second / GIGA, 3)} GFLOP/s` : null, measurement?.roof ? `${plain(measurement.roof.bytes_per_second / GIGA, 3)} GB/s, ridge ${plain(measurement.roof.flops_per_second / measurement.roof.bytes_per_second, 3)} FLOP/B` : null],
    ["Energy", measurement ? measurement.energy_source ?? "not measured" : null, null],
  ];
  return items.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value, more]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, h("b", {}, String(value)), more ? h("small", {}, more) : null)));
}

function standfirst(report) {
  const { protocol, baseline, measurement } = report.results;
  const there = elsewhere(report.results);
  const place = there ? `; runs on ${there}, costs measured on ${deviceText(measurement.device, measurement.threads)}` : protocol.device ? " on one kind of device" : "";
  const others = report.models.length - (baseline ? 1 : 0);
  const on = protocol.data?.name ? ` on ${protocol.data.name}` : "";
  const seeds = protocol.seeds?.length ?? 0;
  const how = seeds ? `, ${seeds} ${seeds === 1 ? "run" : "runs"} each` : "";
  const compared = baseline ? `${others} ${others === 1 ? "model" : "models"} beside ${baseline}` : `${others} ${others === 1 ? "model" : "models"}`;
  return `${compared}${on}${how}: what each gains in accuracy and what it costs, on paper and measured, under one protocol${place}.`;
}
