"use strict";
// Draws each chart when it comes near the screen, in the colours of the page's light or dark ground.

const charts = { views: new Map(), values: {}, datasets: {} };

function appearance() {
  const ink = style("--ink"), muted = style("--muted"), line = style("--line"), font = "system-ui, sans-serif";
  const words = { labelColor: muted, titleColor: ink, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal", labelFont: font, titleFont: font };
  return {
    background: style("--ground"), font, view: { stroke: null }, text: { color: ink },
    axis: { ...words, gridColor: line, domainColor: muted, tickColor: line }, legend: { ...words, labelColor: ink, symbolBaseFillColor: ink, symbolBaseStrokeColor: ink, layout: { bottom: { direction: "vertical", anchor: "start", margin: 6 } } },
    style: { reading: { color: style("--accent") }, reference: { color: muted }, "reference-name": { color: muted, fontSize: 10 } },
  };
}

async function drawChart(box) {
  const key = box.dataset.chart, text = document.querySelector(`[data-spec="${key}"]`).textContent;
  const spec = JSON.parse(text, (_, value) => typeof value === "string" && /^#[0-9a-f]{6}$/i.test(value) ? readable(value) : value);
  spec.datasets = { [spec.data.name]: charts.datasets[spec.data.name] };
  if (!spec.data.name) delete spec.datasets;
  spec.params = [...(spec.params ?? []).map(one => one.name in charts.values ? { ...one, value: charts.values[one.name] } : one), { name: "ground", value: style("--ground") }];
  charts.views.get(key)?.finalize();
  const { view, finalize } = await vegaEmbed(box, spec, {
    mode: "vega-lite", renderer: charts.many ? "canvas" : "svg", config: appearance(), downloadFileName: key, scaleFactor: 2,
    actions: { export: true, source: false, compiled: false, editor: false }, tooltip: { theme: "custom", disableDefaultStyle: false },
  });
  charts.views.set(key, { view, finalize });
  box.dataset.drawn = "yes";
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
