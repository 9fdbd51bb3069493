"use strict";
// What the box above a table understands: words, and limits of columns by key or heading, as in `topk l0<=50` or
// `Variance explained > 0.8`.

const SIGNS = {
  "<": (value, limit) => value < limit, "<=": (value, limit) => value <= limit,
  ">": (value, limit) => value > limit, ">=": (value, limit) => value >= limit,
  "=": (value, limit) => value === limit,
};
const OTHER_SIGNS = { "≤": "<=", "≥": ">=", "=<": "<=", "=>": ">=", "==": "=" };
const plain = name => name.toLowerCase().replace(/[\s_]+/g, " ").trim();

// {words, limits: [{index, sign, limit, text}], problems: [sentence]}: a limit that has a problem is left out.
function understood(typed, columns) {
  const words = [], limits = [], problems = [];
  let end = 0;
  for (const found of typed.matchAll(/([^<>=≤≥]*)(<=|>=|==|=<|=>|[<>=≤≥])\s*([^\s<>=≤≥]*)/g)) {
    const [whole, before, written, text] = found, sign = OTHER_SIGNS[written] ?? written;
    end = found.index + whole.length;
    const { index, left, problem } = column(before.trim().split(/\s+/), columns);
    words.push(...left);
    const limit = Number(text.replace("−", "-"));
    if (problem) problems.push(problem);
    else if (!text) problems.push(`After ${before.trim()} ${written} comes a number`);
    else if (Number.isNaN(limit) && sign !== "=") problems.push(`“${text}” is no number, so this limit is left out; decimals follow a point, as in 0.8`);
    else limits.push({ index, sign, limit, text: text.toLowerCase() });
  }
  words.push(...typed.slice(end).split(/\s+/).filter(Boolean));
  return { words: words.map(word => word.toLowerCase()), limits, problems };
}

// The column that the last of these words name; the words before its name are `left`.
function column(words, columns) {
  for (let start = 0; start < words.length; start++) {
    const name = plain(words.slice(start).join(" ")), left = words.slice(0, start);
    const same = columns.findIndex(one => plain(one.key) === name || plain(one.label) === name);
    if (same >= 0) return { index: same, left };
    const begun = columns.filter(one => name && plain(one.label).startsWith(`${name} `)), shown = begun.filter(one => one.shown);
    const only = shown.length === 1 ? shown[0] : begun.length === 1 ? begun[0] : null;
    if (only) return { index: columns.indexOf(only), left };
    if (begun.length) return { left, problem: `“${words.slice(start).join(" ")}” begins several headings, so this limit is left out: ${begun.slice(0, 4).map(one => one.label).join(", ")}` };
  }
  if (!words.join("")) return { left: [], problem: "Before a limit comes a column, as in l0<50" };
  const guesses = words.map((_, start) => ({ start, ...nearest(plain(words.slice(start).join(" ")), columns) }));
  const { start, names } = guesses.reduce((best, one) => one.distance < best.distance ? one : best);
  return { left: words.slice(0, start), problem: `No column “${words.slice(start).join(" ")}”, so this limit is left out; nearest: ${names.join(", ")}` };
}

// The three columns whose key or heading is most like a name, and how unlike the first is (0: the same, 1: nothing alike).
function nearest(name, columns) {
  const unlike = known => known.includes(name) && name.length > 1 ? 0.3 : edits(name, known) / Math.max(name.length, known.length);
  const found = columns.map(one => [Math.min(unlike(plain(one.key)), unlike(plain(one.label))), one]).sort((one, other) => one[0] - other[0]).slice(0, 3);
  return { distance: found[0]?.[0] ?? 1, names: found.map(([, one]) => one.key === one.label.toLowerCase() ? one.key : `${one.key} (${one.label})`) };
}

// How many letters must be put in, left out or replaced to make one text of another.
function edits(one, other) {
  let above = [...other].map((_, place) => place + 1);
  [...one].forEach((letter, line) => {
    let corner = line, before = line + 1;
    above = above.map((up, place) => {
      before = Math.min(up + 1, before + 1, corner + (letter === other[place] ? 0 : 1));
      corner = up;
      return before;
    });
  });
  return above.at(-1) ?? one.length;
}
