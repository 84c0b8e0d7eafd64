"use strict";
// Protocol and commands.

const nested = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

// A nested record as lines [path, value], one for each plain value or list.
function flatten(record, prefix = "") {
  return Object.entries(record).flatMap(([key, value]) =>
    (nested(value) ? flatten(value, `${prefix}${key}.`) : [[prefix + key, value]]));
}

function protocolTables({ protocol, measurement }) {
  const text = (value) => {
    if (Array.isArray(value)) return value.map(text).join(", ");
    return value === null || value === "" ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value);
  };
  const entries = Object.entries(protocol);
  const parts = [["general", Object.fromEntries(entries.filter(([, value]) => !nested(value)))],
    ...entries.filter(([, value]) => nested(value)), ["measurement", measurement ?? {}]];
  return h("div", { class: "protocol", id: "protocol-tables" },
    parts.filter(([, record]) => Object.keys(record).length).map(([title, record]) =>
      h("table", { "data-protocol": title }, h("caption", {}, title), h("tbody", {}, flatten(record).map(([path, value]) =>
        h("tr", {}, h("th", { scope: "row" }, path), h("td", { "data-path": path }, text(value))))))));
}

function commandBlock(title, text, notes = []) {
  const code = h("code", {}, text);
  const button = h("button", { type: "button", class: "copy", onclick: async () => {
    const copied = await navigator.clipboard.writeText(text).then(() => true, () => false);
    if (!copied) getSelection().selectAllChildren(code); // without permission: selected, to be copied by key
    button.textContent = copied ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  } }, "Copy");
  return h("div", { class: "command" }, h("p", {}, title), button, h("pre", { tabindex: "0" }, code),
    notes.length ? h("p", { class: "notes" }, notes.join(" · ")) : null);
}

function commandList(report) {
  return h("div", {}, commandBlock("This comparison", report.results.command),
    report.models.filter(({ row }) => row.runs.length).map((model) => commandBlock([marker(model), model.name],
      model.row.runs.map((run) => run.command).join("\n"), [model.row.model?.source, ...(model.row.model?.notes ?? [])].filter(Boolean))));
}
