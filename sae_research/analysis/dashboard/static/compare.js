"use strict";
(async () => {
  const {number, count} = lab;
  const {pair, one, other, score, root} = document.body.dataset;
  const data = await lab.load(pair, "data.js");
  const n = data.partner.length;
  const texts = data.labels_one.map((label, i) => `${label}\n${data.labels_other[i]}`.toLowerCase());
  const status = document.getElementById("status"), search = document.getElementById("search");
  const looked = new lab.SearchField(search, texts, [{sae: one, root: `${root}${one}/`, latent: row => row},
    {sae: other, root: `${root}${other}/`, latent: row => data.partner[row]}], refresh);
  const table = new lab.Table(document.getElementById("latents"), {
    printed: 60, label: `Latents of ${one} with their partners in ${other}`, rows: Array.from({length: n}, (_, i) => i),
    address: row => `#latent=${row}${looked.query ? `&find=${encodeURIComponent(looked.query)}` : ""}`,
    columns: [
      {title: one, name: "id", sort: row => row, value: row => String(row), ascending: true},
      {title: other, name: "id", sort: row => data.partner[row], value: row => data.partner[row] < 0 ? "none" : String(data.partner[row]), ascending: true},
      {title: score.split(":")[0], name: "figure", sort: row => data.score[row] ?? -Infinity, value: row => number(data.score[row])},
      {title: `${one}: density`, name: "figure less", sort: row => data.density_one[row], value: row => number(data.density_one[row])},
      {title: `${other}: density`, name: "figure less", sort: row => data.density_other[row], value: row => number(data.density_other[row])},
      {title: `${one} fires on`, name: "tokens", value: row => [...looked.hint(row), data.labels_one[row]]},
      {title: `${other} fires on`, name: "tokens less", value: row => data.labels_other[row]},
    ],
  });

  function refresh() {
    const rows = looked.rows();
    table.show(rows);
    status.textContent = !rows.length ? looked.nothing()
      : (rows.length === n ? `${count(n)} latents` : `${count(rows.length)} of ${count(n)} latents`)
        + (looked.waiting ? "; reading their contexts …" : "");
  }

  async function show() {
    const latent = Number(lab.hash().latent ?? 0);
    if (!(Number.isInteger(latent) && latent >= 0 && latent < n)) throw new Error(`${one} has latents 0 to ${count(n - 1)}`);
    for (const [side, sae, found] of [["one", one, latent], ["other", other, data.partner[latent]]]) {
      const box = document.getElementById(side), link = document.getElementById(`${side}-link`);
      link.textContent = found < 0 ? "" : `latent ${found}`;
      link.href = `${root}${sae}/latent.html#latent=${found}`;
      if (found < 0) box.textContent = "No latent of it is like this one.";
      else await lab.latent(box, sae, `${root}${sae}/`, found, lab.hash().find);
    }
    document.body.dataset.ready = String(latent);
  }

  addEventListener("hashchange", () => show().catch(lab.fail));
  lab.keys({...table.keys(), "/": () => search.focus()});
  refresh();
  await show();
})().catch(lab.fail);
