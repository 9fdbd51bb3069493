"use strict";
(async () => {
  const {el, number, count} = lab;
  const name = document.body.dataset.sae;
  const index = await lab.load(`${name}/index`, "data/index.js");
  const columns = Object.fromEntries(Object.entries(index.columns).map(([key, text]) => [key, lab.unpack(text, Float32Array)]));
  const kind = lab.unpack(index.kind, Uint8Array);
  const labels = index.labels.split("\n"), promoted = index.promoted.split("\n");
  const texts = labels.map((label, i) => `${label}\n${promoted[i]}`.toLowerCase());
  const chosen = {kinds: new Set(), from: -Infinity, to: Infinity};
  const status = document.getElementById("status"), search = document.getElementById("search");
  const looked = new lab.SearchField(search, texts, [{sae: name, root: "", latent: row => row}], refresh);

  const figure = key => ({sort: row => columns[key][row], value: row => number(columns[key][row])});
  const table = new lab.Table(document.getElementById("latents"), {
    label: "Latents", rows: Array.from({length: index.n}, (_, i) => i),
    address: row => `latent.html#latent=${row}${looked.query ? `&find=${encodeURIComponent(looked.query)}` : ""}`,
    columns: [
      {title: "Latent", name: "id", sort: row => row, value: row => String(row), ascending: true},
      {title: "Fires on", name: "tokens", value: row => [...looked.hint(row), labels[row]]},
      {title: "Density", name: "figure", ...figure("density")},
      {title: "Largest", name: "figure", ...figure("max")},
      {title: "Mean", name: "figure less", ...figure("mean")},
      {title: "Per context", name: "figure less", ...figure("cah")},
      {title: "Raises", name: "tokens less", value: row => promoted[row]},
    ],
  });

  function refresh() {
    let rows = looked.rows();
    const found = rows.length;
    if (chosen.kinds.size) rows = rows.filter(row => chosen.kinds.has(kind[row]));
    if (chosen.to < Infinity) rows = rows.filter(row => columns.density[row] >= chosen.from && columns.density[row] < chosen.to);
    table.show(rows);
    status.replaceChildren(rows.length === index.n ? `${count(index.n)} latents` : `${count(rows.length)} of ${count(index.n)} latents`);
    if (looked.waiting && rows.length) status.append("; reading their contexts …");
    if (chosen.to < Infinity) {
      status.append(` of density ${number(chosen.from, 2)} to ${number(chosen.to, 2)} `, el("button", {type: "button", click: () => {
        chosen.from = -Infinity; chosen.to = Infinity; refresh();
      }}, "any density"));
    }
    if (!rows.length) status.append(". ", found ? `The search finds ${count(found)}, all of other densities.` : looked.nothing());
  }

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

  const {edges, counts, dead, expected, rare, dense} = index.bars;
  const gap = 3;  // the dead have a bar of their own, apart from the axis
  const n = edges.length - 1, whole = n + gap;
  const bars = [{parts: [{height: dead, kind: "dead"}], label: `dead: ${count(dead)}`}, {parts: []}, {parts: []},
    ...Array.from({length: n}, (_, i) => ({parts: Object.entries(counts).map(([kind, held]) => ({height: held[i], kind})),
      label: `${number(10 ** edges[i], 2)} to ${number(10 ** edges[i + 1], 2)}: ` + (Object.entries(counts)
        .filter(([, held]) => held[i]).map(([kind, held]) => `${count(held[i])} ${kind}`).join(", ") || "none")}))];
  const place = density => (gap + (Math.log10(density) - edges[0]) / (edges[n] - edges[0]) * n) / whole;
  const ticks = [{at: 0.5 / whole, text: "dead"}, ...edges.filter(Number.isInteger).map(edge => ({at: place(10 ** edge), text: number(10 ** edge, 2)}))];
  document.getElementById("density").append(lab.bars(bars, ticks, {
    title: `Latents by density, on a logarithmic axis: ${index.kinds.map((label, code) =>
      `${count(kind.reduce((sum, one) => sum + (one === code), 0))} ${label}`).join(", ")}`,
    yTitle: "latents", xTitle: "density: the fraction of tokens on which a latent fires (log scale)",
    marks: expected > 0 ? [place(expected)] : [],
    pick: i => {
      [chosen.from, chosen.to] = i ? [10 ** edges[i - gap], 10 ** edges[i - gap + 1]] : [-Infinity, 1e-30];
      refresh();
      table.scroller.scrollIntoView({block: "nearest"});
    },
  }), el("p", {class: "muted hint"}, `Dashed: ${number(expected, 2)}, the density of every latent if all fired equally often (L0 / latents). ` +
    `Dense: ${number(dense, 2)} or more; rare: below ${number(rare, 2)}. Choose a bar to see its latents.`));

  lab.keys({...table.keys(), "/": () => search.focus()});
  const asked = lab.hash();
  if (asked.search !== undefined) { search.value = asked.search; search.focus(); }
  looked.look();
  document.body.dataset.ready = "yes";
})().catch(lab.fail);
