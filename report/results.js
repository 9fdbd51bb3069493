"use strict";
// The page of results: hands data to tables and charts, and reads all architectures at one L0.

function number(value) {
  const size = Math.abs(value);
  if (size >= 100 || value === 0) return value.toFixed(0);
  return size >= 10 ? value.toFixed(1) : size >= 0.01 ? value.toFixed(3) : String(Number(value.toPrecision(2)));
}

// The value at an L0: that of a measured point where one is equal (the larger at most `same` times the smaller), else linear in
// log L0 between the points beside it; undefined outside them.
function at(curve, l0, same) {
  const near = curve.filter(([x]) => Math.max(x, l0) <= same * Math.min(x, l0));
  if (near.length) return near.reduce((best, point) => Math.abs(Math.log(point[0] / l0)) < Math.abs(Math.log(best[0] / l0)) ? point : best)[1];
  const place = curve.findIndex(([x]) => x > l0);
  if (place < 1) return undefined;
  const [[x0, y0], [x1, y1]] = [curve[place - 1], curve[place]];
  return y0 + (y1 - y0) * Math.log(l0 / x0) / Math.log(x1 / x0);
}

function showReading(reading, marks) {
  const table = document.getElementById("reading-table"), field = document.getElementById("read-l0"), slide = document.getElementById("slide-l0");
  if (!table || !reading.range.length) return;
  const [low, high] = reading.range.map(Math.log), show = l0 => {
    const rows = reading.lines.map(line => ({
      name: line.label, kind: "", group: line.group, role: line.group === "control" ? "control" : "", flags: [],
      cells: reading.columns.map(column => { const value = at(line.curves[column.key] ?? [], l0, reading.same); return value === undefined ? [] : [value, number(value)]; }),
    }));
    resultsTable(table, { columns: reading.columns, rows, marks });
    setCharts("read_at", l0);
  };
  const slideTo = l0 => { slide.value = high > low ? 1000 * (Math.log(l0) - low) / (high - low) : 0; slide.ariaValueText = `L0 ${number(l0)}`; };
  slide.oninput = () => { const l0 = Math.exp(low + (high - low) * slide.value / 1000); field.value = number(l0); slide.ariaValueText = `L0 ${number(l0)}`; show(l0); };
  field.oninput = () => { const l0 = Number(field.value); if (l0 > 0) { slideTo(l0); show(l0); } };
  const most = mostRead(reading);
  field.value = number(most);
  slideTo(most);
  show(most);
}

// The measured L0 at which most architectures can be read.
function mostRead(reading) {
  const curves = reading.lines.map(line => Object.values(line.curves)[0] ?? []).filter(curve => curve.length);
  const covered = l0 => curves.filter(curve => at(curve, l0, reading.same) !== undefined).length;
  return curves.flatMap(curve => curve.map(point => point[0])).reduce((best, l0) => covered(l0) > covered(best) ? l0 : best);
}

function start() {
  const marks = given("marks"), results = given("results"), tasks = given("tasks");
  const named = document.getElementById("results-table");
  resultsTable(named, { ...results, marks }, { choose: true, flags: true });
  document.body.dataset.ready = "table";
  colorIcons();
  watchScrolling();
  watchCharts(given("datasets"), results.rows.length > 200);
  showReading(given("reading"), marks);
  const legend = document.getElementById("legend");
  if (legend) legend.onchange = () => setCharts("shown", [...legend.querySelectorAll("input:checked")].map(box => box.value));
  choose("matrix-choice", index => document.querySelectorAll("[data-matrix]").forEach(one => { one.hidden = Number(one.dataset.matrix) !== index; }));
  choose("task-choice", index => {
    resultsTable(document.getElementById("task-table"), { ...tasks[index], marks }, { heat: true, limit: `${tasks[index].columns[0].key}>0.7` });
  });
  document.body.dataset.ready = "yes";
}
start();
