"use strict";
// Draws each chart when it comes near the screen, in the colours of the page's light or dark ground.

const charts = { views: new Map(), values: {}, datasets: {} };

function appearance() {
  const ink = style("--ink"), muted = style("--muted"), line = style("--line"), font = "system-ui, sans-serif";
  const words = { labelColor: muted, titleColor: ink, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal", labelFont: font, titleFont: font };
  return {
    background: style("--ground"), font, view: { stroke: null }, text: { color: ink },
    title: { color: ink, font, fontSize: 14, subtitleColor: muted, subtitleFont: font, subtitleFontSize: 11 },
    axis: { ...words, gridColor: line, domainColor: muted, tickColor: line }, legend: { ...words, labelColor: ink, symbolBaseFillColor: ink, symbolBaseStrokeColor: ink, layout: { bottom: { direction: "vertical", anchor: "start", margin: 6 } } },
    style: { reading: { color: style("--accent") }, reference: { color: muted }, "reference-name": { color: muted, fontSize: 10 } },
  };
}

// The chart of a box, with its rows and in colours that can be seen on the present ground; `values`: of its parameters.
function specification(box, values) {
  const text = document.querySelector(`[data-spec="${box.dataset.chart}"]`).textContent;
  const spec = JSON.parse(text, (_, value) => typeof value === "string" && /^#[0-9a-f]{6}$/i.test(value) ? readable(value) : value);
  spec.datasets = { [spec.data.name]: charts.datasets[spec.data.name] };
  if (!spec.data.name) delete spec.datasets;
  spec.params = [...(spec.params ?? []).map(one => one.name in values ? { ...one, value: values[one.name] } : one), { name: "ground", value: style("--ground") }];
  return spec;
}

async function drawChart(box) {
  const key = box.dataset.chart;
  charts.views.get(key)?.finalize();
  const { view, finalize } = await vegaEmbed(box, specification(box, charts.values), {
    mode: "vega-lite", renderer: charts.many ? "canvas" : "svg", config: appearance(), actions: false, tooltip: { theme: "custom", disableDefaultStyle: false },
  });
  charts.views.set(key, { view, finalize });
  box.dataset.drawn = "yes";
  offerToSave(box);
}

// A menu in the chart's corner.
function offerToSave(box) {
  if (box.parentElement.querySelector(".save")) return;
  const title = box.parentElement.querySelector("figcaption").textContent, menu = node("details", { className: "save" });
  const button = (words, kind) => {
    const made = node("button", { type: "button" }, words);
    made.onclick = async () => {
      const link = node("a", { href: await picture(box, kind), download: `${box.dataset.chart}.${kind}` });
      link.click();
      menu.open = false;
    };
    return made;
  };
  const summary = node("summary", { title: "Save this chart as a picture", ariaLabel: `Save: ${title}` }, "⋯");
  menu.append(summary, node("div", {}, button("Save as PNG", "png"), button("Save as SVG", "svg")));
  menu.onkeydown = event => { if (event.key === "Escape") { menu.open = false; summary.focus(); } };
  box.before(menu);
}

// The address of a chart's picture, which can be read without the page: with title, legend and what its signs mean, and
// without the L0 at which the page reads.
async function picture(box, kind) {
  const spec = specification(box, charts.values), notes = box.dataset.notes.split("\n").filter(Boolean);
  const title = { text: box.parentElement.querySelector("figcaption").textContent, anchor: "start", offset: 12 };
  Object.assign(spec, { title: notes.length ? { ...title, subtitle: notes } : title, width: WIDTH, autosize: { type: "pad" }, padding: 14 });
  if (spec.layer) spec.layer = spec.layer.filter(layer => layer.mark?.style !== "reading");
  const legend = legendOf(spec, box.dataset.chart), patch = vega => ({ ...vega, legends: [...vega.legends ?? [], ...legend] });
  const { view, finalize } = await vegaEmbed(node("div"), spec, { mode: "vega-lite", renderer: "svg", config: appearance(), actions: false, patch });
  const address = await view.toImageURL(kind, 2);
  finalize();
  return address;
}

const WIDTH = 560;  // pixels of a picture's plot

// A legend, in Vega's own words, of the architectures that a chart draws, where the page names them outside the chart.
function legendOf(spec, key) {
  const marked = (spec.layer ?? []).map(layer => layer.encoding?.shape).find(shape => shape?.field === "group");
  if (!marked) return [];
  const drawn = new Set(charts.datasets[spec.data.name].filter(row => row[key] !== undefined).map(row => row.group));
  const shown = charts.values.shown ?? [...drawn], colors = Object.fromEntries(Object.entries(given("marks")).map(([name, mark]) => [name, readable(mark.color)]));
  const color = { signal: `(${JSON.stringify(colors)})[datum.value]` };
  return [{
    shape: "shape", values: marked.scale.domain.filter(name => drawn.has(name) && shown.includes(name)),
    orient: "bottom", direction: "horizontal", columns: 4, labelLimit: 0, encode: { symbols: { update: { fill: color, stroke: color } } },
  }];
}

function setCharts(name, value) {
  charts.values[name] = value;
  for (const { view } of charts.views.values()) {
    try { view.signal(name, value); } catch { continue; }  // a chart without this parameter
    view.runAsync();
  }
}

function watchCharts(datasets, many) {
  Object.assign(charts, { datasets, many });
  const boxes = [...document.querySelectorAll("[data-chart]")];
  const near = new IntersectionObserver(seen => seen.filter(one => one.isIntersecting).forEach(one => {
    near.unobserve(one.target);
    drawChart(one.target);
  }), { rootMargin: "400px" });
  boxes.forEach(box => near.observe(box));
  dark.addEventListener("change", () => boxes.filter(box => box.dataset.drawn).forEach(drawChart));
  addEventListener("beforeprint", () => boxes.filter(box => !box.dataset.drawn).forEach(drawChart));
}
