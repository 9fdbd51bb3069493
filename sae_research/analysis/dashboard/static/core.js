"use strict";
// Pages opened from disk may not fetch: every data file is a script that calls lab.put(key, content).
const lab = (() => {
  const KEPT = 24;
  const held = new Map();
  const loading = new Map();

  function put(key, content) {
    held.set(key, content);
    if (held.size > KEPT) held.delete(held.keys().next().value);
  }

  /** The content of a data file, loaded once. */
  function load(key, address) {
    if (held.has(key)) return Promise.resolve(held.get(key));
    if (!loading.has(key)) {
      loading.set(key, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = address;
        script.onload = () => held.has(key) ? resolve(held.get(key)) : reject(new Error(`${address} does not hold ${key}`));
        script.onerror = () => reject(new Error(`${address} cannot be read: is the folder complete?`));
        for (const end of ["load", "error"]) script.addEventListener(end, () => script.remove());
        document.head.append(script);
      }).finally(() => loading.delete(key)));
    }
    return loading.get(key);
  }

  /** An element: attributes by name (a function listens), then children (text is text, never markup). */
  function el(name, attributes = {}, ...children) {
    const svg = ["svg", "rect", "g", "line", "text", "title"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (typeof value === "function") node.addEventListener(key, value);
      else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat().filter(child => child !== null && child !== undefined));
    return node;
  }

  /** A number with at most `digits` significant digits, as text. */
  function number(value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-4) return value.toExponential(digits - 1).replace("+", "");
    return Number(value.toPrecision(digits)).toString();
  }

  const count = value => value.toLocaleString("en");

  /** Typed array of a base64 text. */
  function unpack(text, Kind) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Kind(bytes.buffer);
  }

  /** A token as text that can be seen. */
  const visible = token => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");

  const hash = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

  /** Keys by name; none while someone types, or holds Ctrl, Alt or Meta. */
  function keys(actions) {
    document.addEventListener("keydown", event => {
      if (event.ctrlKey || event.altKey || event.metaKey || document.getElementById("help").open) return;
      const typing = event.target.matches("input:not([type=checkbox]), textarea, select");
      if (typing && event.key === "Escape") event.target.blur();
      if (typing && !(event.target.type === "search" && ["ArrowDown", "Enter"].includes(event.key))) return;
      if (event.key === "Enter" && event.target.closest("a, button, summary")) return;
      const act = actions[event.key];
      if (act && act(event) !== false) event.preventDefault();
    });
  }

  function fail(error) {
    const status = document.getElementById("status") ?? document.getElementById("main");
    status.classList.remove("hidden", "muted");
    status.classList.add("note");
    status.textContent = error.message;
  }

  // paper shows what a fold hides
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not([open])")) { fold.open = true; fold.dataset.shut = ""; }
  });
  addEventListener("afterprint", () => {
    for (const fold of document.querySelectorAll("details[data-shut]")) { fold.open = false; delete fold.dataset.shut; }
  });

  const help = document.getElementById("help");
  document.getElementById("help-button").addEventListener("click", () => help.showModal());
  keys({"?": () => help.showModal()});
  return {put, load, el, number, count, unpack, visible, hash, keys, fail};
})();
