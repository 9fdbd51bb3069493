"use strict";
/** Bar charts in SVG. bars: [{height, label, kind}]; ticks: [{at: bar's edge, text}]. Scales with its box. */
lab.bars = (bars, ticks, {title, height = 120, pick = null, log = false} = {}) => {
  const {el} = lab;
  const unit = 10, low = 18, width = bars.length * unit;
  const scale = value => value <= 0 ? 0 : log ? Math.log10(1 + value) : value;
  const most = Math.max(...bars.map(bar => scale(bar.height)), 1e-9);
  const svg = el("svg", {viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": title});
  bars.forEach((bar, i) => {
    if (!bar.height) return;
    const tall = Math.max(1, scale(bar.height) / most * (height - 4));
    const rect = el("rect", {x: i * unit + 0.5, y: height - tall, width: unit - 1, height: tall, class: bar.kind ?? "bar",
                             "data-bar": i}, el("title", {}, bar.label));
    if (pick) rect.addEventListener("click", () => pick(i));
    svg.append(rect);
  });
  // text outside of the stretched drawing keeps its shape
  const axis = el("div", {class: "axis", "aria-hidden": "true"}, ticks.map(tick => {
    const mark = el("span", {}, tick.text);
    mark.style.left = `${100 * tick.at / bars.length}%`;
    return mark;
  }));
  return el("div", {class: pick ? "bars pickable" : "bars"}, svg, axis);
};

/** Bars of counts between edges, with about five ticks. */
lab.histogram = (counts, edges, {title, kind = "bar", unit = "", log = false} = {}) => {
  const bars = counts.map((height, i) => ({height, kind: typeof kind === "function" ? kind(edges[i], edges[i + 1]) : kind,
    label: `${lab.number(edges[i])} to ${lab.number(edges[i + 1])}${unit}: ${lab.count(height)}`}));
  const step = Math.max(1, Math.ceil(edges.length / 5));
  const ticks = edges.map((edge, at) => ({at, text: lab.number(edge, 2)})).filter(tick => tick.at % step === 0);
  return lab.bars(bars, ticks, {title, log});
};
