"use strict";
/** One latent of an SAE, drawn into a box. root: where the SAE's folder is; find: text to mark contexts by. */
lab.latent = (() => {
  const {el, number, count} = lab;

  async function draw(box, sae, root, latent, find = "") {
    box.setAttribute("aria-busy", "true");
    const about = await lab.load(`${sae}/about`, `${root}data/about.js`);
    if (!(Number.isInteger(latent) && latent >= 0 && latent < about.n)) throw new Error(`${sae} has latents 0 to ${count(about.n - 1)}`);
    const file = String(Math.floor(latent / about.per_file)).padStart(5, "0");
    const content = await lab.load(`${sae}/${file}`, `${root}data/${file}.js`);
    const found = content.latents[latent % about.per_file];
    box.replaceChildren(words(found), ...sections(found, content.strings, about, sae, root, lab.plain(find)));
    box.setAttribute("aria-busy", "false");
    return found;
  }

  function words(found) {
    const rare = `fires on ${found.label}; too rarely to be described`;
    return el("p", {class: "words"}, found.explained?.words ?? (found.count ? rare : "never fired on this text"));
  }

  const figures = found => el("dl", {class: "figures"}, [
    ["Density", number(found.density), `${count(found.count)} tokens`, found.kind],
    ["Largest", number(found.max), found.min < 0 ? `lowest ${number(found.min)}` : `mean ${number(found.mean)}`],
    ["Per context", number(found.cah), `in ${count(found.contexts_firing)} contexts`],
  ].map(([label, value, hint, kind]) => el("div", {class: kind ?? null}, el("dt", {}, label), el("dd", {}, value),
    el("dd", {class: "hint"}, kind ? `${hint}, ${kind === "between" ? "neither rare nor dense" : kind}` : hint))));

  const section = (title, ...children) => el("section", {}, el("h2", {}, title), ...children);

  function sections(found, strings, about, sae, root, find) {
    const top = found.contexts.filter(one => one.level < 0);
    const levels = Array.from({length: about.levels}, (_, i) => about.levels - 1 - i);
    const largest = Math.max(...found.contexts.map(one => Math.max(...one.a.map(Math.abs), 0)), 1e-9);
    const draw = one => context(one, strings, largest, find);
    return [el("div", {class: "latent"},
      el("div", {class: "first"}, section("Top contexts", top.length ? el("ol", {class: "contexts"}, top.map(draw)) : el("p", {class: "muted"}, "none"))),
      el("div", {class: "beside"}, figures(found), activations(found, about), logits(found, about), explained(found), near(found, root), hosted(found, about)),
      el("div", {class: "sampled"}, levels.map(level => [level, found.contexts.filter(one => one.level === level)]).filter(([, some]) => some.length).map(
        ([level, some]) => section(`Sampled, ${share(level, about.levels)}`, el("ol", {class: "contexts"}, some.map(draw))))),
    )];
  }

  const share = (level, levels) => `${Math.round(100 * level / levels)} to ${Math.round(100 * (level + 1) / levels)} % of its activations`;

  function context(one, strings, largest, find) {
    const found = find && lab.plain(one.t.map(token => strings[token]).join("")).includes(find);
    const text = el("p", {class: "text"}, one.more[0] ? "… " : null);
    let plain = "", next = 0;
    one.t.forEach((token, at) => {
      const fires = one.i[next] === at;
      if (!fires && at !== one.at) { plain += strings[token]; return; }
      if (plain) { text.append(shown(plain)); plain = ""; }
      const value = fires ? one.a[next++] : 0;
      const mark = el("mark", {class: `${value < 0 ? "negative" : ""}${at === one.at ? " peak" : ""}`.trim() || null,
                               "data-value": number(value, 4)}, shown(strings[token]));
      mark.style.setProperty("--a", (Math.abs(value) / largest).toFixed(3));
      text.append(mark);
    });
    if (plain) text.append(shown(plain));
    if (one.more[1]) text.append(" …");
    return el("li", {class: found ? "found" : null}, el("p", {class: "value"}, el("b", {}, number(one.v)), el("span", {class: "muted"}, ` ${one.source.replaceAll("_", " ")}`)), text);
  }

  // line breaks as signs, so that a context stays one paragraph
  const shown = text => text.replace(/\r\n?|\n/g, "⏎").replaceAll("\t", "⇥");

  function activations(found, about) {
    const charts = found.bars.map(({edges, counts}) => lab.histogram(counts, edges, {
      title: `Non-zero activations from ${number(edges[0])} to ${number(edges[edges.length - 1])}, logarithmic axis`,
      xTitle: "activation where it fires", yTitle: "tokens", log: true, kind: edges[0] < 0 ? "negative" : "bar"}));
    return section("Activations", ...(charts.length ? charts : [el("p", {class: "muted"}, "none")]),
      found.count ? el("p", {class: "muted"}, about.quantiles.map((q, i) => `${Math.round(100 * q)} % below ${number(found.quantiles[i])}`).join(" · ")) : null);
  }

  function logits(found, about) {
    if (!found.logits) return section("Next token", el("p", {class: "muted"}, about.no_logits));
    const {raised, lowered, counts, edges} = found.logits;
    const side = (title, rows) => el("table", {class: "tokens"}, el("caption", {}, title), el("tbody", {}, rows.map(
      ([token, value]) => el("tr", {}, el("th", {scope: "row"}, el("code", {}, lab.visible(token))), el("td", {}, number(value))))));
    return section("Next token", el("div", {class: "sides"}, side("raised", raised), side("lowered", lowered)),
      lab.histogram(counts, edges, {title: "Logits that a unit of this latent adds, over the vocabulary",
        xTitle: "logit that one unit of it adds", yTitle: "tokens of the vocabulary", logCounts: true}));
  }

  function near(found, root) {
    return section("Nearest latents", el("table", {class: "tokens"}, el("thead", {}, el("tr", {}, ["Latent", "Cosine", "Fires on"].map(
      title => el("th", {scope: "col"}, title)))), el("tbody", {}, found.near.map(one => el("tr", {},
      el("th", {scope: "row"}, el("a", {href: `${root}latent.html#latent=${one.id}`}, String(one.id))), el("td", {}, number(one.cosine)),
      el("td", {class: "long"}, one.label))))));
  }

  function explained(found) {
    const known = found.explained;
    if (!known) return section("Fires on", el("p", {}, found.label || "none"));
    const list = (title, rows, at) => el("table", {class: "tokens"}, el("caption", {}, title), el("tbody", {}, rows.map(row => el("tr", {
      title: `fires at ${row[1]} of its ${row[2]} occurrences`}, el("th", {scope: "row"}, el("code", {}, lab.visible(row[0]))), el("td", {}, number(row[at]))))));
    const scores = Object.entries(known.auc).map(([rule, auc]) => `${rule} ${number(auc, 2)}`).join(" · ");
    return section("Fires on", el("div", {class: "sides"}, list("mean activation", known.by_mean, 3),
      list("most specific: PMI, bits", known.by_pmi, 4)), scores ? el("p", {class: "muted"}, `held-out AUC: ${scores}`) : null,
      el("p", {class: "muted"}, `${Math.round(100 * known.purity)} % of its firings are at one token; mean position ${Math.round(100 * known.position)} % of the context`));
  }

  function hosted(found, about) {
    if (!about.neuronpedia) return null;
    const page = `https://www.neuronpedia.org/${about.neuronpedia}/${found.id}`;
    const box = section("Neuronpedia", el("p", {class: "bar"}, el("a", {href: page, rel: "noopener"}, "its page there ↗"),
      el("button", {type: "button", click: event => event.target.replaceWith(
        el("iframe", {src: page + about.embed, title: `Neuronpedia's view of latent ${found.id}`}))}, "show it here (loads from the network)")));
    return box;
  }

  // one tooltip for all marks
  const tip = el("div", {id: "tip", role: "tooltip", hidden: true});
  document.body.append(tip);
  const show = event => {
    const mark = event.target.closest?.("mark[data-value]");
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.value;
    const place = mark.getBoundingClientRect();
    tip.style.left = `${Math.min(place.left, innerWidth - 80)}px`;
    tip.style.top = `${place.bottom + 4}px`;
  };
  for (const kind of ["pointerover", "click"]) document.addEventListener(kind, show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});

  return draw;
})();
