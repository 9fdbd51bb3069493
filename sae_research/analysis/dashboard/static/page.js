"use strict";
(() => {
  const sae = document.body.dataset.sae;
  const box = document.getElementById("latent"), field = document.getElementById("number");
  const previous = document.getElementById("previous"), next = document.getElementById("next");
  const status = document.getElementById("status"), last = Number(field.max);
  let now = 0;

  const go = latent => { location.hash = `latent=${Math.max(0, Math.min(last, latent))}`; };

  async function show() {
    const asked = Number(lab.hash().latent ?? 0);
    try {
      await lab.latent(box, sae, "", asked, lab.hash().find);
    } catch (error) {
      lab.fail(error);
      return;
    }
    if (asked !== Number(lab.hash().latent ?? 0)) return;
    now = asked;
    field.value = asked;
    document.title = `Latent ${asked} of ${sae}`;
    for (const [link, by] of [[previous, -1], [next, 1]]) {
      const to = asked + by;
      link.toggleAttribute("inert", to < 0 || to > last);
      link.href = `#latent=${Math.max(0, Math.min(last, to))}`;
    }
    status.className = "hidden";
    status.textContent = `Latent ${asked}`;
    scrollTo(0, 0);
    document.body.dataset.ready = String(asked);
    // once painted: since the page was asked for, at its first latent
    requestAnimationFrame(() => setTimeout(() => { document.body.dataset.opened ??= String(Math.round(performance.now())); }));
  }

  document.getElementById("go").addEventListener("submit", event => { event.preventDefault(); go(field.valueAsNumber); field.blur(); });
  field.addEventListener("change", () => { if (field.validity.valid) go(field.valueAsNumber); });
  addEventListener("hashchange", show);
  const step = by => () => go(now + by);
  lab.keys({j: step(1), k: step(-1), ArrowRight: step(1), ArrowLeft: step(-1), g: () => field.select(),
            u: () => { location.href = "index.html"; }, "/": () => { location.href = "index.html#search="; }});
  show();
})();
