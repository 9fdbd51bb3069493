"use strict";
/**
 * Bar charts in SVG with numbers on both axes; they scale with their box.
 * bars: [{parts: [{height, kind}], label}], of equal width; x: [{at: 0 to 1, text}]; marks: places of upright lines, 0 to 1.
 */
lab.bars = (bars, x, {title, xTitle, yTitle, pick = null, log = false, marks = []} = {}) => {
  const {el, count} = lab;
  const unit = 10, height = 120, width = bars.length * unit;
  const tall = bar => bar.parts.reduce((sum, part) => sum + part.height, 0);
  const scale = value => log ? Math.log10(1 + value) : value;
  const most = Math.max(...bars.map(tall), 1), top = scale(most);
  const svg = el("svg", {viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": title});
  const y = (log ? decades(most) : lab.ticks(0, most, 4)).map(value => ({at: scale(value) / top, text: count(value)}));
  for (const {at} of y) {
    svg.append(el("line", {x1: 0, x2: width, y1: height * (1 - at), y2: height * (1 - at), class: "grid"}));
  }
  bars.forEach((bar, i) => {
    let below = 0;
    for (const {height: part, kind} of bar.parts.filter(part => part.height)) {
      const from = scale(below) / top * height, to = scale(below += part) / top * height;
      const rect = el("rect", {x: i * unit + 0.5, y: height - Math.max(to, from + 1), width: unit - 1, height: Math.max(1, to - from),
                               class: kind ?? "bar", "data-bar": i}, el("title", {}, bar.label));
      if (pick) rect.addEventListener("click", () => pick(i));
      svg.append(rect);
    }
  });
  for (const at of marks) svg.append(el("line", {x1: at * width, x2: at * width, y1: 0, y2: height, class: "expected"}));
  // text outside of the stretched drawing keeps its shape
  const labels = (name, side, ticks) => el("div", {class: name, "aria-hidden": "true"}, ticks.map(({at, text}) => {
    const mark = el("span", {}, text);
    mark.style[side] = `${100 * at}%`;
    return mark;
  }));
  const across = labels("x", "left", x), up = labels("y", "bottom", y);
  new ResizeObserver(() => { thin(across, "left", "right", 8); thin(up, "bottom", "top", 2); }).observe(across);
  return el("figure", {class: pick ? "bars pickable" : "bars"}, el("p", {class: "axis-title"}, yTitle + (log ? " (log scale)" : "")),
            up, svg, across, el("figcaption", {class: "axis-title"}, xTitle));

  /** Hide the labels that would touch one before them. */
  function thin(box, from, to, gap) {
    let end = -Infinity;
    for (const mark of box.children) {
      const place = mark.getBoundingClientRect(), sign = to === "top" ? -1 : 1;
      const free = sign * place[from] >= end + gap;
      mark.style.visibility = free ? "visible" : "hidden";
      if (free) end = sign * place[to];
    }
  }

  /** 0, 1, 10, 100, … */
  function decades(end) {
    const found = [0];
    for (let value = 1; value <= end; value *= 10) found.push(value);
    return found.length > 5 ? found.filter((_, i) => i === 0 || i % 2 === 1) : found;
  }

};

/** Round numbers between two, at most about so many. */
lab.ticks = (from, to, most = 5) => {
  const rough = (to - from) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(one => one * power).find(one => one >= rough);
  const found = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + step * 1e-9; i++) found.push(i * step || 0);  // never -0
  return found;
};

/** Bars of counts between edges. log: the edges grow by one factor (all of one sign). */
lab.histogram = (counts, edges, {title, xTitle, yTitle, kind = "bar", log = false, logCounts = false} = {}) => {
  const bars = counts.map((height, i) => ({parts: [{height, kind}],
    label: `${lab.number(edges[i])} to ${lab.number(edges[i + 1])}: ${lab.count(height)}`}));
  const first = edges[0], last = edges[edges.length - 1];
  const on = log ? Math.log : value => value;
  const place = value => (on(Math.abs(value)) - on(Math.abs(first))) / (on(Math.abs(last)) - on(Math.abs(first)));
  const linear = value => (value - first) / (last - first);
  let values = lab.ticks(first, last);
  if (log) {
    const low = Math.min(Math.abs(first), Math.abs(last)), high = Math.max(Math.abs(first), Math.abs(last));
    values = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const one of [1, 2, 5]) {
        const value = one * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) values.push(first < 0 ? -value : value);
      }
    }
    if (values.length < 2) values = [first, last];
    values.sort((a, b) => a - b);
  }
  const x = values.map(value => ({at: log ? place(value) : linear(value), text: lab.number(value, 3)}));
  return lab.bars(bars, x, {title, xTitle: xTitle + (log ? " (log scale)" : ""), yTitle, log: logCounts});
};
