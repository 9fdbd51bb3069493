"use strict";
// Tables that sort, filter and choose columns. Data: {columns: [{key, label, arrow, about, part, shown}], rows: [{name, kind, group,
// role, flags, cells: [[value, text, interval]]}]}.

const LIMIT = 60;  // rows drawn at first: laying out thousands of cells takes longer than a key press should

function resultsTable(table, data, options = {}) {
  const tools = document.querySelector(`[data-tools="${table.id}"]`);
  const columns = data.columns.map(one => ({ ...one }));
  const words = data.rows.map(row => [row.name, row.kind, row.role, ...row.flags].join(" ").toLowerCase());
  const values = (row, column) => column < 0 ? row.name : row.cells[column][0];
  const filtered = table.dataset.filter === "yes";
  let order = table.order ?? { column: null }, intervals = false, limit = filtered ? LIMIT : Infinity;
  const roles = new Set(data.rows.map(row => row.role));
  const head = node("thead"), body = node("tbody");
  table.querySelectorAll("thead, tbody").forEach(part => part.remove());
  table.append(head, body);
  let lines = [];

  function draw() {
    const shown = columns.map((column, index) => [column, index]).filter(([column]) => column.shown);
    const first = node("th", { scope: "col" }, sorter(-1, table.dataset.first, ""));
    head.replaceChildren(node("tr", {}, first, ...shown.map(([column, index]) => {
      const cell = node("th", { scope: "col", title: explained(column) });
      cell.append(sorter(index, `${column.label} ${column.arrow}`.trim()));
      return cell;
    }), ...(options.flags ? [node("th", { scope: "col", className: "words" }, "Flags")] : [])));
    const spans = options.heat && shown.map(([, index]) => span(index));
    lines = data.rows.map((row, place) => {
      const mark = data.marks?.[row.group], parts = row.name.split(/(?<=_)/).flatMap(part => [part, node("wbr")]);
      const name = node("span", { className: "named" }, ...(mark ? [icon(mark)] : []), node("span", {}, ...parts));
      const line = node("tr", { className: row.role, hidden: true, place }, node("th", { scope: "row" }, name));
      shown.forEach(([, index], column) => {
        const [value, text, bounds] = row.cells[index];
        const cell = node("td", {}, text ?? "–");
        if (intervals && bounds) cell.append(node("span", { className: "interval" }, bounds));
        else if (bounds) cell.title = `95 % interval ${bounds}`;
        if (spans && value !== undefined) cell.style.setProperty("--share", spans[column](value));
        line.append(cell);
      });
      if (options.flags) line.append(node("td", { className: "words" }, row.flags.join(", ")));
      return line;
    });
    sort();
    filter();
  }

  // What a column means, and by which name the filter knows it.
  function explained(column) {
    return [column.about, filtered && column.key !== column.label.toLowerCase() ? `Key: ${column.key}` : ""].filter(Boolean).join("\n");
  }

  function span(index) {
    const known = data.rows.map(row => row.cells[index][0]).filter(value => value !== undefined);
    const low = Math.min(...known), high = Math.max(...known);
    return value => high > low ? ((value - low) / (high - low)).toFixed(3) : "0";
  }

  function sorter(index, label) {
    const button = node("button", { type: "button" }, label);
    button.onclick = () => {
      const numbers = index >= 0, again = order.column === index;
      order = again && order.down !== numbers ? { column: null } : { column: index, down: again ? !order.down : numbers };
      table.order = order;  // stays when the table is drawn from other data
      sort();
      filter();
      head.querySelectorAll("button")[index < 0 ? 0 : 1 + columns.slice(0, index).filter(one => one.shown).length].focus();
    };
    button.dataset.column = index;
    return button;
  }

  function sort() {
    const places = data.rows.map((_, place) => place);
    if (order.column !== null) {
      const sign = order.down ? -1 : 1, at = place => values(data.rows[place], order.column);
      places.sort((one, other) => {
        const [a, b] = [at(one), at(other)];
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);  // absent ones last
        return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      });
    }
    body.replaceChildren(...places.map(place => lines[place]));
    head.querySelectorAll("button").forEach(button => {
      const sorted = Number(button.dataset.column) === order.column;
      button.parentElement.setAttribute("aria-sort", !sorted ? "none" : order.down ? "descending" : "ascending");
    });
  }

  const help = `Words, as in ${options.word ?? "topk"}, and limits by a heading or its key, as in ${options.limit ?? "l0<50"}; signs are < <= > >= =`;
  const search = node("input", { type: "search", placeholder: `Filter: ${options.word ?? "topk"}, or ${options.limit ?? "l0<50"}`, ariaLabel: "Filter rows", title: help });
  const status = node("span", { role: "status" });
  const hint = node("p", { className: "filter-hint hint", id: `${table.id}-hint`, role: "status", textContent: help });
  search.setAttribute("aria-describedby", hint.id);
  function filter() {
    const { words: wanted, limits, problems } = understood(search.value, columns);
    const terms = [
      ...wanted.map(word => place => words[place].includes(word)),
      ...limits.map(({ index, sign, limit, text }) => place => {
        const [value, shown] = data.rows[place].cells[index];
        return value !== undefined && (SIGNS[sign](value, limit) || (sign === "=" && shown.toLowerCase() === text));
      }),
    ];
    const said = problems.length ? `${problems.join(". ")}.` : `${help}.`;
    if (hint.textContent !== said) hint.textContent = said;
    hint.classList.toggle("problem", problems.length > 0);
    let left = 0;
    for (const line of body.rows) {
      const place = line.place, stays = roles.has(data.rows[place].role) && terms.every(holds => holds(place));
      left += stays;
      line.hidden = !stays || left > limit;
    }
    const hidden = Math.max(0, left - limit);
    status.replaceChildren(left === data.rows.length ? `${left} rows` : `${left} of ${data.rows.length} rows`, ...(hidden ? [", ", more] : []));
    more.textContent = `show ${hidden} more`;
  }
  const more = node("button", { type: "button" });
  more.onclick = () => { limit = Infinity; filter(); };
  search.oninput = filter;

  function check(label, checked, change) {
    const box = node("input", { type: "checkbox", checked });
    box.onchange = () => change(box.checked);
    return node("label", {}, box, label);
  }

  if (filtered) {
    const kinds = [...roles];
    tools.replaceChildren(search);
    if (kinds.length > 1) tools.append(node("fieldset", {}, node("legend", { className: "hidden" }, "Roles"),
      ...kinds.map(kind => check(kind, true, on => { on ? roles.add(kind) : roles.delete(kind); filter(); }))));
    if (data.rows.some(row => row.cells.some(cell => cell[2]))) tools.append(check("intervals", false, on => { intervals = on; draw(); }));
    tools.append(status, hint);
    if (options.choose) {
      const parts = new Map();
      columns.forEach(column => parts.set(column.part, [...(parts.get(column.part) ?? []), column]));
      tools.append(node("details", {}, node("summary", {}, `Columns (${columns.length})`), node("div", { className: "columns" },
        ...[...parts].map(([part, group]) => node("div", { role: "group", ariaLabel: part }, node("strong", {}, part),
          ...group.map(column => Object.assign(check(column.label, column.shown, on => { column.shown = on; draw(); }), { title: explained(column) })))))));
    }
  }
  draw();
}
