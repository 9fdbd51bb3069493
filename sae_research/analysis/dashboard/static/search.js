"use strict";
/**
 * The text of an SAE's contexts, loaded when first asked for.
 * Resolves to query => how many of each latent's stored contexts hold it (case and line breaks aside), a Uint16Array.
 */
lab.text = (() => {
  const NONE = 2 ** 32 - 1;
  const built = new Map();

  return (sae, root) => {
    if (!built.has(sae)) built.set(sae, lab.load(`${sae}/text`, `${root}data/text.js`).then(build));
    return built.get(sae);
  };

  function build({size, around, each, strings, tokens, about}) {
    const said = strings.map(lab.plain), ids = lab.unpack(tokens, Uint32Array), places = lab.unpack(about, Uint32Array);
    const starts = new Uint32Array(ids.length + 1), parts = [];
    let length = 0;
    ids.forEach((id, i) => {
      if (i && i % size === 0) { parts.push("\n"); length++; }  // no phrase runs from one context into the next
      starts[i] = length;
      parts.push(said[id]);
      length += said[id].length;
    });
    starts[ids.length] = length;
    const text = parts.join("");

    /** The token that holds a character. */
    function tokenAt(character) {
      let low = 0, high = ids.length;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (starts[middle] <= character) low = middle; else high = middle;
      }
      return low;
    }

    return query => {
      const counts = new Uint16Array(places.length / each), firsts = [], lasts = [];
      for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + 1)) {
        firsts.push(tokenAt(at));
        lasts.push(tokenAt(at + query.length - 1));
      }
      if (!firsts.length) return counts;
      // the first hit that begins at a token or after it
      const next = new Int32Array(ids.length + 1).fill(firsts.length);
      for (let hit = firsts.length - 1, token = ids.length - 1; token >= 0; token--) {
        while (hit >= 0 && firsts[hit] >= token) hit--;
        next[token] = hit + 1;
      }
      places.forEach((place, i) => {
        if (place === NONE) return;
        const context = place - place % size;
        const hit = next[Math.max(place - around, context)];
        if (hit < firsts.length && lasts[hit] < Math.min(place + around + 1, context + size)) counts[Math.floor(i / each)]++;
      });
      return counts;
    };
  }
})();

/** Text as it is searched: lower case, line breaks as spaces. */
lab.plain = text => text.toLowerCase().replace(/\s/g, " ");

/**
 * The search of a page with a table. texts: of every row, lower case; within: row => how many of its contexts hold the query.
 * Returns the rows found: those whose text holds the query or whose number it is, then those with contexts, most first.
 */
lab.search = (texts, query, n, within = null) => {
  const wanted = lab.plain(query).trim();
  const direct = [], further = [];
  for (let row = 0; row < n; row++) {
    if (!wanted || texts[row].includes(wanted) || String(row) === wanted) direct.push(row);
    else if (within?.(row)) further.push(row);
  }
  return direct.concat(further.sort((a, b) => within(b) - within(a) || a - b));
};

/** A search field over rows, of `texts` and of the contexts of SAEs. sources: [{sae, root, latent: row => latent or -1}]. */
lab.SearchField = class {
  constructor(field, texts, sources, changed) {
    Object.assign(this, {field, texts, sources, changed, finders: null, waiting: false, counts: null});
    field.addEventListener("input", () => this.look());
    field.form.addEventListener("submit", event => event.preventDefault());
  }

  get query() { return lab.plain(this.field.value).trim(); }

  /** Contexts are read once there is something to look for. */
  look() {
    const query = this.query;
    this.counts = null;
    if (query.length > 1 && this.finders) this.counts = this.finders.map(find => find(query));
    else if (query.length > 1 && !this.waiting) {
      this.waiting = true;
      Promise.all(this.sources.map(({sae, root}) => lab.text(sae, root))).then(finders => {
        Object.assign(this, {finders, waiting: false});
        this.look();
      }).catch(lab.fail);
    }
    this.changed();
  }

  /** In how many contexts of a row's latents the query stands. */
  within(row) {
    return this.counts ? this.counts.reduce((sum, counts, i) => sum + (counts[this.sources[i].latent(row)] || 0), 0) : 0;
  }

  rows() { return lab.search(this.texts, this.field.value, this.texts.length, row => this.within(row)); }

  /** What stands before a row's tokens. */
  hint(row) {
    const found = this.within(row);
    return found ? [lab.el("span", {class: "muted"}, `in ${found} context${found === 1 ? "" : "s"} · `)] : [];
  }

  /** What the page says where no row is left. */
  nothing() {
    if (this.waiting) return "Reading the contexts …";
    return `Nothing found for “${this.field.value.trim()}”: no latent has this number, fires on or raises such a token, or shows it ` +
      "in one of its stored contexts. Try fewer letters, or one word of several.";
  }
};
