"use strict";
// What the columns of the table are: where each figure stands in results.json and how it is written.

const MEGA = 1e6;
const GIGA = 1e9;

// A column: key, group, label, long (its name on an axis), unit, better ("higher" or "lower"),
// path(row) to the figure, scale (of what is written), digits (after the point, see setDigits).
function column(key, group, label, options = {}) {
  const { unit = "", scale = 1, digits, better = "higher", path, long = label, spread = false, kind = "number", note = "" } = options;
  const named = unit ? `${long}, ${unit}` : long;
  return { key, group, label, long: named, unit, scale, digits, better, path: path ?? (() => key), spread, kind, note };
}

function accuracyColumns(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.accuracy ?? {})))];
  return names.flatMap((name) => {
    const own = column(`accuracy.${name}`, "Accuracy", name, { digits: 3, spread: true });
    if (!rows.some((row) => row.difference?.[name])) return [own];
    const delta = { digits: 3, kind: "difference", long: `Δ${name} to the baseline` };
    return [own, column(`difference.${name}`, "Accuracy", `Δ${name}`, delta)];
  });
}

function classColumns(rows) {
  const names = [...new Set(rows.flatMap((row) => (row.classes ?? []).map((item) => item.name)))];
  return ["AP", "AP50"].flatMap((figure) => names.map((name, place) =>
    column(`classes.${figure}.${place}`, `${figure} by class`, name, {
      digits: 3, spread: true, long: `${figure} of ${name}`,
      path: (row) => {
        const index = (row.classes ?? []).findIndex((item) => item.name === name);
        return index < 0 ? null : `classes.${index}.${figure}`;
      },
    })));
}

function paperColumns() {
  const less = { better: "lower" };
  const paper = (name, label, options) => column(`cost.${name}`, "Cost on paper", label, { ...less, ...options });
  const parts = ["backbone", "neck", "head"].flatMap((part) => [
    column(`cost.${part}.params`, "Cost by section", `${part} params`, { unit: "M", scale: MEGA, ...less }),
    column(`cost.${part}.macs`, "Cost by section", `${part} MACs`, { unit: "G", scale: GIGA, ...less }),
    column(`cost.${part}.flops`, "Cost by section", `${part} FLOPs`, { unit: "G", scale: GIGA, ...less }),
  ]);
  const rule = (name, label, long) => column(`cost.${name}`, "Guidelines G1 to G4", label, { long, ...less });
  return [
    paper("params", "Params", { unit: "M", scale: MEGA }),
    paper("macs", "MACs", { unit: "G", scale: GIGA }),
    paper("flops", "FLOPs", { unit: "G", scale: GIGA }),
    paper("access_bytes", "Memory access", { unit: "MB", scale: MEGA, long: "Memory access of the convolutions" }),
    paper("bytes", "All traffic", { unit: "MB", scale: MEGA, long: "Traffic of all kernels" }),
    paper("activation_bytes", "Activations", { unit: "MB", scale: MEGA, long: "Activation memory at its peak" }),
    paper("intensity", "Intensity", { unit: "FLOP/B", better: "higher", long: "Arithmetic intensity" }),
    ...parts,
    rule("unequal_widths", "G1 widths", "G1: access by unequal widths, 1 is best"),
    rule("groups", "G2 groups", "G2: access by group convolutions, 1 is best"),
    rule("kernels", "G3 kernels", "G3: kernels launched"),
    rule("branches", "G3 branches", "G3: kernels side by side"),
    rule("elementwise", "G4 element-wise", "G4: share of element-wise operations"),
  ];
}

function measuredColumns({ rows, measurement }) {
  const energyAt = [...new Set(rows.map((row) => row.energy?.batch).filter(isNumber))];
  const spent = energyAt.length ? { note: `batch ${energyAt.join(", ")}`, at: ` at batch ${energyAt.join(", ")}` } : { note: "", at: "" };
  const timedAt = [...(measurement?.batches ?? []), ...rows.flatMap((row) => row.latency.map((item) => item.batch))];
  const batches = [...new Set(timedAt.length ? timedAt : [1])].sort((a, b) => a - b);
  const timed = batches.flatMap((batch) => {
    const one = (name, label, unit, options = {}) => column(`latency.${batch}.${name}`, "Cost measured", label, {
      ...options,
      long: `${label} at batch ${batch}`,
      unit,
      note: `batch ${batch}`,
      path: (row) => {
        const index = row.latency.findIndex((item) => item.batch === batch);
        return index < 0 ? null : `latency.${index}.${name}`;
      },
    });
    const less = { better: "lower" };
    return [
      one("p50_ms", "Latency p50", "ms/image", less),
      one("p90_ms", "Latency p90", "ms/image", less),
      one("least_ms", "Latency least", "ms/image", less),
      one("images_per_second", "Throughput", "images/s"),
      one("gflops_per_second", "Efficiency", "GFLOP/s"),
      one("memory_bytes", "Peak memory", "MB", { ...less, scale: MEGA }),
    ];
  });
  const gained = { kind: "speedup" };
  const speedups = !rows.some((row) => row.speedup) ? [] : [
    column("speedup.flops", "Speed-up", "By FLOPs", { ...gained, long: "Speed-up that the FLOPs promise" }),
    ...batches.map((batch) => column(`speedup.latency.${batch}`, "Speed-up", "Measured", {
      ...gained,
      long: `Speed-up measured at batch ${batch}`,
      note: `batch ${batch}`,
      path: (row) => {
        const index = (row.speedup?.latency ?? []).findIndex((item) => item.batch === batch);
        return index < 0 ? null : `speedup.latency.${index}.factor`;
      },
    })),
  ];
  return [
    ...timed,
    ...speedups,
    column("energy.joules_per_image", "Cost measured", "Energy", { unit: "J/image", better: "lower", note: spent.note, long: `Energy${spent.at}` }),
    column("energy.watts", "Cost measured", "Power", { unit: "W", better: "lower", note: spent.note, long: `Power${spent.at}` }),
    ...(rows.some((row) => row.training) ? trainingColumns() : []),
  ];
}

function trainingColumns() {
  return [
    column("training.images_per_second", "Training", "Training speed", { unit: "images/s", spread: true }),
    column("training.wait_share", "Training", "Waiting for data", { unit: "%", scale: 0.01, better: "lower", spread: true }),
    column("training.seconds", "Training", "Time to train", { unit: "min", scale: 60, better: "lower", spread: true }),
  ];
}

function errorColumns(rows) {
  const kinds = ["delta", "special"].flatMap((part) => {
    const names = [...new Set(rows.flatMap((row) => Object.keys(row.errors?.[part] ?? {})))];
    return names.map((name) => [`errors.${part}.${name}`, name]);
  });
  return kinds.map(([key, name]) => column(key, "AP50 lost to", name, { digits: 3, better: "lower", long: `AP50 lost to: ${name}` }));
}

const MOST_DECIMALS = 4;

// All figures of a column have the decimals that give its smallest three digits, and its smallest
// deviation one.
function setDigits(chosen, rows) {
  if (chosen.digits !== undefined) return chosen;
  const found = rows.map((row) => chosen.path(row)).map((path, place) => (path === null ? undefined : at(rows[place], path)));
  const sizes = (items) => items.map((item) => Math.abs(item / chosen.scale)).filter((item) => isNumber(item) && item > 0);
  const values = sizes(found.map((item) => (chosen.spread ? item?.mean : item)));
  const deviations = sizes(found.map((item) => (chosen.spread ? item?.sd : NaN)));
  const after = (items, digits) => (items.every(Number.isInteger) ? 0 : digits - 1 - Math.floor(Math.log10(Math.min(...items))));
  return { ...chosen, digits: Math.min(Math.max(after(values, 3), after(deviations, 1), 0), MOST_DECIMALS) };
}

function write(chosen, value) {
  return Math.abs(value) >= 1e5 ? plain(value) : fixed(value, chosen.digits);
}

function allColumns(results) {
  const { rows } = results;
  return [
    ...accuracyColumns(rows), ...classColumns(rows), ...errorColumns(rows), ...paperColumns(),
    ...measuredColumns(results),
  ].map((chosen) => setDigits(chosen, rows));
}

// Why a figure is not there, in words.
function absence(model, chosen, spot) {
  const { row } = model;
  const part = chosen.key.split(".")[0];
  if (["difference", "speedup"].includes(chosen.kind) && model.baseline) return "baseline";
  if (part === "latency") return spot?.cause ? "failed" : "not measured";
  if (part === "energy" || part === "speedup") return "not measured";
  if (row[part] && chosen.kind !== "difference") return "not defined";
  if (row.status === "failed") return "failed";
  if (part === "cost") return "not counted";
  return part === "training" || row.status === "profiled" ? "not trained" : "not measured";
}

function readDifference(found, path) {
  const [delta, low, high] = [found.delta, found.low, found.high].map((value) => fixed(value, 3));
  const plus = found.delta > 0 ? "+" : "";
  const main = `${plus}${delta}${found.significant ? "*" : ""}`;
  const spread = `[${low}, ${high}]`;
  const hint = `${plain(found.level * 100)} % interval, ${found.resamples} resamples of the images, seeds ${found.seeds.join(", ")}: ${found.significant ? "significant" : "not significant"}`;
  return { value: found.delta, raw: found.delta, path: `${path}.delta`, sd: null, main, spread, text: `${main} ${spread}`, hint, significant: found.significant };
}

// A row's figure in a column: value in the column's scale (null if absent), sd likewise, the raw
// number and its path in the row, and the text of the cell (main and spread).
function readFigure(model, chosen) {
  const { row } = model;
  const path = chosen.path(row);
  const found = path === null ? undefined : at(row, path);
  if (chosen.kind === "difference" && found) return readDifference(found, path);
  const raw = chosen.spread ? found?.mean : found;
  if (!isNumber(raw)) {
    const spot = path?.startsWith("latency.") ? at(row, path.split(".").slice(0, 2).join(".")) : null;
    const main = absence(model, chosen, spot);
    return { value: null, raw: null, path: null, sd: null, main, spread: "", text: main, hint: spot?.cause ?? null };
  }
  const value = raw / chosen.scale;
  const sd = chosen.spread && isNumber(found.sd) ? found.sd / chosen.scale : null;
  const main = write(chosen, value);
  const spread = sd === null ? "" : `± ${write(chosen, sd)}`;
  const written = (item) => (isNumber(item) ? write(chosen, item / chosen.scale) : "none");
  const hint = chosen.spread && found.values.length > 1 ? `seeds ${row.seeds.join(", ")}: ${found.values.map(written).join(", ")}` : null;
  return { value, raw, path: chosen.spread ? `${path}.mean` : path, sd, main, spread, text: spread ? `${main} ${spread}` : main, hint };
}
