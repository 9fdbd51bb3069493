"use strict";
(async () => {
  const {el, number, count} = lab;
  const name = document.body.dataset.sae;
  const index = await lab.load(`${name}/index`, "data/index.js");
  const columns = Object.fromEntries(Object.entries(index.columns).map(([key, text]) => [key, lab.unpack(text, Float32Array)]));
  const kind = lab.unpack(index.kind, Uint8Array);
  const labels = index.labels.split("\n"), promoted = index.promoted.split("\n");
  const texts = labels.map((label, i) => `${label}\n${promoted[i]}`.toLowerCase());
  const chosen = {query: "", kinds: new Set(), from: -Infinity, to: Infinity};
  const status = document.getElementById("status"), search = document.getElementById("search");

  const figure = key => ({sort: row => columns[key][row], value: row => number(columns[key][row])});
  const table = new lab.Table(document.getElementById("latents"), {
    label: "Latents", rows: Array.from({length: index.n}, (_, i) => i), address: row => `latent.html#latent=${row}`,
    columns: [
      {title: "Latent", name: "id", sort: row => row, value: row => String(row), ascending: true},
      {title: "Fires on", name: "tokens", value: row => labels[row]},
      {title: "Density", name: "figure", ...figure("density")},
      {title: "Largest", name: "figure", ...figure("max")},
      {title: "Mean", name: "figure less", ...figure("mean")},
      {title: "Per context", name: "figure less", ...figure("cah")},
      {title: "Raises", name: "tokens less", value: row => promoted[row]},
    ],
  });

  function refresh() {
    let rows = lab.search(texts, chosen.query, index.n);
    if (chosen.kinds.size) rows = rows.filter(row => chosen.kinds.has(kind[row]));
    if (chosen.to < Infinity) rows = rows.filter(row => columns.density[row] >= chosen.from && columns.density[row] < chosen.to);
    table.show(rows);
    status.replaceChildren(rows.length === index.n ? `${count(index.n)} latents` : `${count(rows.length)} of ${count(index.n)} latents`);
    if (chosen.to < Infinity) {
      status.append(` of density ${number(chosen.from, 2)} to ${number(chosen.to, 2)} `, el("button", {type: "button", click: () => {
        chosen.from = -Infinity; chosen.to = Infinity; refresh();
      }}, "any density"));
    }
  }

  search.addEventListener("input", () => { chosen.query = search.value; refresh(); });
  document.getElementById("filter").addEventListener("submit", event => event.preventDefault());
  document.getElementById("random").addEventListener("click", () => {
    if (table.order.length) location.href = `latent.html#latent=${table.order[Math.floor(Math.random() * table.order.length)]}`;
  });
  index.kinds.forEach((label, code) => {
    const held = kind.reduce((sum, one) => sum + (one === code), 0);
    document.querySelector(".kinds").append(el("label", {class: `kind ${label}`}, el("input", {type: "checkbox", change: event => {
      event.target.checked ? chosen.kinds.add(code) : chosen.kinds.delete(code);
      refresh();
    }}), ` ${label} `, el("span", {class: "muted"}, count(held))));
  });

  const {edges, counts, dead, rare, dense} = index.bars;
  const bars = [{height: dead, kind: "dead", label: `dead: ${count(dead)}`}, {height: 0}, {height: 0},
    ...counts.map((height, i) => ({height, kind: edges[i + 1] <= rare + 1e-9 ? "rare" : edges[i] >= dense - 1e-9 ? "dense" : "between",
      label: `${number(10 ** edges[i], 2)} to ${number(10 ** edges[i + 1], 2)}: ${count(height)}`}))];
  const ticks = [{at: 0.5, text: "dead"}, ...edges.map((edge, i) => ({at: i + 3, text: number(10 ** edge, 2)}))
    .filter((_, i) => Number.isInteger(edges[i]))];
  document.getElementById("density").append(lab.bars(bars, ticks, {
    title: `Latents by density, on a logarithmic axis: ${index.kinds.map((label, code) =>
      `${count(kind.reduce((sum, one) => sum + (one === code), 0))} ${label}`).join(", ")}`,
    pick: i => {
      [chosen.from, chosen.to] = i ? [10 ** edges[i - 3], 10 ** edges[i - 2]] : [-Infinity, 1e-30];
      refresh();
      table.scroller.scrollIntoView({block: "nearest"});
    },
  }), el("p", {class: "muted axis-title"}, "fraction of tokens on which a latent fires; choose a bar to see its latents"));

  lab.keys({...table.keys(), "/": () => search.focus()});
  const asked = lab.hash();
  if (asked.search !== undefined) { search.value = chosen.query = asked.search; search.focus(); }
  refresh();
  document.body.dataset.ready = "yes";
})().catch(lab.fail);
