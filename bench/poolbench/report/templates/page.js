"use strict";
// The page's own script. Text from the run reaches the page by textContent only.

const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark", dark.matches);
dark.addEventListener("change", follow);
follow();

function significant(value, digits = 3) {
  if (value === 0) return "0";
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(places, 12));
}
function seconds(value) {
  for (const [size, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]])
    if (value >= size) return significant(value / size) + " " + unit;
  return significant(value / 1e-9) + " ns";
}
const FORMATS = {
  seconds, times: (v) => significant(v) + "x", share: (v) => significant(100 * v, 2) + "%", number: (v) => significant(v, 2),
};
function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

// The choice.
const FIELDS = ["op", "device", "mode", "direction", "dtype", "shape", "others"];
const chooser = document.getElementById("chooser");
const answer = document.getElementById("answer");
const byKey = new Map(data.answers.map((a) => [JSON.stringify(a.key), a]));
const caveatsOf = (op, device, name) => (data.caveats.find((r) => r[0] === op && r[1] === device && r[2] === name) || [])[3];
const distinct = (values) => [...new Set(values)];

const optionOf = (value, text) => Object.assign(element("option", text), { value });
function options(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map((value) => optionOf(value, value)));
  if (values.includes(before)) select.value = before;
}
function volume(shape) { return shape.split("x").reduce((a, b) => a * Number(b), 1); }

function start() {
  const ops = distinct(data.answers.map((a) => a.key[0]));
  if (!ops.length) {
    chooser.hidden = true;
    answer.replaceChildren(element("p", "Nothing in this run is right and timed. This command measures:"), copyable("poolbench run"));
    return;
  }
  const devices = distinct([...data.answers.map((a) => a.key[1]), "cpu:0", "gpu:0"]);
  options(chooser.elements.op, ops);
  options(chooser.elements.device, devices);
  for (const name of ["mode", "direction", "dtype"]) {
    const place = FIELDS.indexOf(name);
    options(chooser.elements[name], distinct([...data.choices[name], ...data.answers.map((a) => a.key[place])]));
  }
  fill();
  chooser.addEventListener("input", (event) => {
    if (event.target.name === "op") fill();
    show();
  });
  chooser.addEventListener("submit", (event) => event.preventDefault());
  show();
}
function fill() { // what the op offers, and its most measured combination
  const mine = data.answers.filter((a) => a.key[0] === chooser.elements.op.value);
  const sizes = distinct(mine.map((a) => a.key[5])).sort((a, b) => volume(a) - volume(b));
  document.getElementById("sizes").replaceChildren(...sizes.map((size) => optionOf(size)));
  chooser.elements.shape.parentElement.hidden = sizes.every((s) => !s);
  options(chooser.elements.others, distinct(mine.map((a) => a.key[6])));
  const count = new Map();
  for (const a of mine) for (let i = 1; i < FIELDS.length; i++) {
    const k = i + ":" + a.key[i];
    count.set(k, (count.get(k) || 0) + 1);
  }
  const score = (a) => a.key.slice(1).reduce((sum, v, i) => sum + count.get((i + 1) + ":" + v), 0);
  const first = mine.reduce((best, a) => (score(a) > score(best) ? a : best), mine[0]);
  FIELDS.slice(1).forEach((name, i) => { chooser.elements[name].value = first.key[i + 1]; });
}
async function copy(button, pre) {
  const label = (button.dataset.label ??= button.textContent); // a second click finds 'Copied'
  try {
    await navigator.clipboard.writeText(pre.textContent);
    button.textContent = "Copied";
  } catch { // a page from disk may not use the clipboard: select the text instead
    getSelection().selectAllChildren(pre);
    button.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => { button.textContent = label; }, 2000);
}
function copyable(text) {
  const box = element("div", undefined, "code");
  const pre = element("pre", text);
  pre.tabIndex = 0;
  const button = element("button", "Copy");
  button.type = "button";
  button.addEventListener("click", () => copy(button, pre));
  box.append(pre, button);
  return box;
}
for (const button of document.querySelectorAll(".card .copy"))
  button.addEventListener("click", () => copy(button, button.previousElementSibling));
function command(chosen) {
  const [op, device, mode, direction, dtype, shape, others] = chosen;
  const [, , settings] = data.settings.find((one) => one[0] === op && one[1] === others) || [0, 0, []];
  const axes = [...(shape ? [["shape", shape]] : []), ["mode", mode], ["direction", direction], ["dtype", dtype], ...settings];
  if (device !== "cpu:0") axes.push(["device", device === "gpu:0" ? "gpu" : device]);
  const safe = (text) => (/^[A-Za-z0-9_:.-]+$/.test(text) ? text : "'...'");
  const select = /^[A-Za-z0-9_]+$/.test(op) ? " --op " + op : "";
  return "poolbench run" + select + axes.map(([n, v]) => " --axis " + n + "=" + safe(v)).join("");
}
function show() {
  const chosen = FIELDS.map((name) => chooser.elements[name].value.trim());
  chosen[5] = chosen[5].replace(/\s+/g, "").replace(/[X×*,]/g, "x");
  const found = byKey.get(JSON.stringify(chosen));
  answer.dataset.row = found ? found.row : "";
  if (!found) {
    if (!chooser.elements.shape.parentElement.hidden && !/^[1-9]\d*(x[1-9]\d*)*$/.test(chosen[5])) {
      answer.replaceChildren(element("p", "A shape is whole numbers with x between them: 32x56x56x96."));
      return;
    }
    answer.replaceChildren(
      element("p", "This case was not measured, or nothing was right in it. This command measures it:"),
      copyable(command(chosen)));
    return;
  }
  const parts = [element("p", "Use " + found.use, "use"), ...found.text.map((line) => element("p", line))];
  const code = data.codes[found.code];
  parts.push(code ? copyable(code) : element("p", "Its code is in the file that registered it, which is not at hand here."));
  const caveats = caveatsOf(chosen[0], chosen[1], found.use);
  if (caveats === undefined) parts.push(element("p", "No support matrix is at hand. To record one, type: poolbench matrix"));
  else if (!caveats.length) parts.push(element("p", "It passes every check of the support matrix."));
  else {
    parts.push(element("p", "Failed checks of the support matrix:"));
    const list = element("ul");
    list.append(...caveats.map((text) => element("li", text)));
    parts.push(list);
  }
  if (found.disagree) parts.push(element("p", "Its processes disagree by more than those of the rest of the run.", "warn"));
  const why = element("p");
  const link = element("a", "Its row and samples");
  link.href = "#all";
  link.addEventListener("click", () => openSamples(found.row));
  why.append(link);
  parts.push(why);
  answer.replaceChildren(...parts);
}

// Samples, loaded from disk when they are asked for.
const chunks = new Map();
window.poolbenchSamples = (number, rows) => chunks.set(number, rows);
function chunk(number) {
  if (chunks.has(number)) return Promise.resolve(chunks.get(number));
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "samples/" + number + ".js";
    script.onload = () => resolve(chunks.get(number));
    script.onerror = () => reject(new Error("samples/" + number + ".js is not beside this page"));
    document.head.append(script);
  });
}
function text(row, column) { return data.words[data.rows[row][column]]; }
async function openSamples(row) {
  const dialog = document.getElementById("samples");
  const note = document.getElementById("samples-text");
  const plot = document.getElementById("samples-plot");
  document.getElementById("samples-title").textContent = text(row, 2) + ", " + text(row, 0) + " " + text(row, 1);
  note.textContent = text(row, 3);
  plot.replaceChildren();
  if (!dialog.open) dialog.showModal();
  try {
    const [encoded, lengths] = (await chunk(Math.floor(row / data.chunk)))[row % data.chunk];
    const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
    const values = [...new Float32Array(bytes.buffer)];
    if (!values.length) { note.textContent += ": no samples"; return; }
    const sorted = [...values].sort((a, b) => a - b);
    note.textContent = values.length + " samples in " + lengths.length + " processes, seconds per call in each block: least " +
      seconds(sorted[0]) + ", median " + seconds(sorted[sorted.length >> 1]) + ", most " + seconds(sorted[sorted.length - 1]) + ".";
    plot.append(strip(values, lengths, sorted));
  } catch (error) { note.textContent = String(error.message); }
}
function strip(values, lengths, sorted) {
  const W = 800, H = 300, L = 80, B = 34;
  const svg = (tag, attributes, content) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
    if (content !== undefined) made.textContent = content;
    return made;
  };
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "samples in the order of measuring, a colour per process" });
  const low = sorted[0], high = sorted[sorted.length - 1] > low ? sorted[sorted.length - 1] : low * 1.01 + 1e-12;
  const x = (i) => L + ((i + 0.5) / values.length) * (W - L - 10);
  const y = (v) => 10 + (1 - (v - low) / (high - low)) * (H - B - 20);
  for (const v of [low, (low + high) / 2, high]) {
    root.append(svg("line", { x1: L, x2: W - 10, y1: y(v), y2: y(v), stroke: "#80808055" }));
    root.append(svg("text", { x: L - 8, y: y(v) + 4, "text-anchor": "end", "font-size": 13, fill: "currentColor" }, seconds(v)));
  }
  root.append(svg("text", { x: (W + L) / 2, y: H - 8, "text-anchor": "middle", "font-size": 13, fill: "currentColor" }, "blocks in the order of measuring; a colour per process"));
  const colours = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#949494", "#56b4e9"];
  let at = 0;
  lengths.forEach((length, process) => {
    for (let i = 0; i < length; i++, at++)
      root.append(svg("circle", { cx: x(at), cy: y(values[at]), r: 3, fill: colours[process % colours.length] }));
  });
  return root;
}

// The table.
// What sorts last at the first click: slow times, small speeds; so does what has no figure.
const LAST = { seconds: Infinity, number: Infinity, times: -1, share: -1, samples: -1 };
function table() {
  const columns = data.columns.map(([title, kind], place) => ({
    title,
    data: null,
    orderSequence: LAST[kind] < 0 ? ["desc", "asc"] : ["asc", "desc"],
    render: (row, type) => {
      const value = data.rows[row][place];
      // DataTables would take text as markup: it gets none to show, and none with markup to search.
      if (type === "display") return "";
      if (kind === "text") return data.words[value].replace(/[&<>]/g, " ");
      if (type === "sort" || type === "type") return value === null ? LAST[kind] : value;
      if (kind === "samples") return value;
      return value === null ? "" : FORMATS[kind](value);
    },
    createdCell: (cell, _, row) => {
      const value = data.rows[row][place];
      if (kind === "samples") {
        if (!value) { cell.textContent = "none"; return; }
        const button = element("button", String(value));
        button.type = "button";
        button.setAttribute("aria-label", value + " samples of " + text(row, 2));
        button.addEventListener("click", () => openSamples(row));
        cell.replaceChildren(button);
      } else {
        cell.textContent = kind === "text" ? data.words[value] : value === null ? "" : FORMATS[kind](value);
        if (["SLOWER", "FASTER"].includes(cell.textContent)) cell.className = cell.textContent.toLowerCase();
      }
    },
  }));
  new DataTable("#measurements", {
    data: data.rows.map((_, i) => i), columns, deferRender: true, pageLength: 25, autoWidth: false, order: [],
    lengthMenu: [10, 25, 100, 500], language: { search: "Filter:", emptyTable: "No measurement" },
  });
}

start();
requestAnimationFrame(() => setTimeout(table, 0)); // after the first view
