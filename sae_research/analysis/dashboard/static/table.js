"use strict";
/**
 * A table of any length that holds only the rows in sight; on paper its first `printed`.
 * columns: [{title, value: row => text or node, sort: row => number (optional), name: class, ascending}]
 * A row is a number. `open(row)` is called for Enter and clicks; `address(row)` makes rows links.
 */
lab.Table = class {
  constructor(box, {columns, label, rows, address, open = null, printed = 500}) {
    Object.assign(this, {box, columns, address, open, printed, rows, order: rows, active: -1, sorted: null, down: true});
    const {el} = lab, parts = title => title.split(/(?<=[_-])|\s+/).filter(Boolean);
    const breakable = title => title.split(/(?<=[_-])/).flatMap(part => [part, el("wbr")]);  // names may break there alone
    this.heads = columns.map((column, i) => column.sort
      ? el("th", {scope: "col", class: column.name}, el("button", {type: "button", click: () => this.sort(i)}, breakable(column.title)))
      : el("th", {scope: "col", class: column.name}, breakable(column.title)));
    // a column is as wide as its heading's longest part, so that no name breaks elsewhere
    this.heads.forEach((head, i) => head.style.setProperty("--longest", Math.max(...parts(columns[i].title).map(part => part.trim().length))));
    this.above = el("tr", {class: "spacer", "aria-hidden": "true"}, el("td"));
    this.below = el("tr", {class: "spacer", "aria-hidden": "true"}, el("td"));
    this.body = el("tbody", {}, this.above, this.below);
    this.table = el("table", {"aria-label": label, class: "virtual"},
                    el("thead", {}, el("tr", {"aria-rowindex": 1}, this.heads)), this.body);
    this.scroller = el("div", {class: "scroller", tabindex: 0, role: "region", "aria-label": label,
                               scroll: () => this.later()}, this.table);
    box.replaceChildren(this.scroller);
    this.height = parseFloat(getComputedStyle(this.scroller).getPropertyValue("--row")) || 32;
    new ResizeObserver(() => this.later()).observe(this.scroller);
    this.note = el("p", {class: "muted print-only"});
    box.append(this.note);
    addEventListener("beforeprint", () => { this.printing = true; this.draw(); });
    addEventListener("afterprint", () => { this.printing = false; this.draw(); });
    this.draw();
  }

  /** Show only these rows, in the order chosen before. */
  show(rows) {
    this.rows = rows;
    this.active = -1;
    this.scroller.scrollTop = 0;
    this.arrange();
  }

  sort(i) {
    const first = !this.columns[i].ascending;
    this.down = this.sorted === i ? !this.down : first;
    this.sorted = i;
    this.heads.forEach((head, j) => j === i ? head.setAttribute("aria-sort", this.down ? "descending" : "ascending")
                                            : head.removeAttribute("aria-sort"));
    this.scroller.scrollTop = 0;
    this.active = -1;
    this.arrange();
  }

  arrange() {
    if (this.sorted === null) this.order = this.rows;
    else {
      const value = this.columns[this.sorted].sort, sign = this.down ? -1 : 1;
      this.order = this.rows.slice().sort((a, b) => sign * (value(a) - value(b)) || a - b);
    }
    this.draw();
  }

  later() {
    this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.draw(); });
  }

  draw() {
    const {el} = lab;
    const seen = Math.ceil((this.scroller.clientHeight || 600) / this.height);
    const first = this.printing ? 0 : Math.max(0, Math.min(Math.floor(this.scroller.scrollTop / this.height) - 6, this.order.length - seen));
    const end = Math.min(this.order.length, this.printing ? this.printed : first + seen + 12);
    this.note.textContent = end < this.order.length ? `The first ${lab.count(end)} of ${lab.count(this.order.length)} rows.` : "";
    const held = this.body.contains(document.activeElement);
    const rows = [];
    for (let at = first; at < end; at++) {
      const row = this.order[at];
      const cells = this.columns.map((column, i) => {
        const value = column.value(row);
        return el(i ? "td" : "th", {class: column.name, scope: i ? null : "row"}, i ? value : el("a", {
          href: this.address(row), "data-at": at, tabindex: at === this.active || (this.active < 0 && at === first) ? 0 : -1,
        }, value));
      });
      rows.push(el("tr", {"aria-rowindex": at + 2, class: at === this.active ? "active" : null, "data-row": row,
                          click: event => { if (!event.target.closest("a")) cells[0].firstChild.click(); }}, cells));
    }
    this.above.firstChild.style.height = `${first * this.height}px`;
    this.below.firstChild.style.height = `${this.printing ? 0 : (this.order.length - end) * this.height}px`;
    this.scroller.hidden = !this.order.length;
    this.body.replaceChildren(this.above, ...rows, this.below);
    this.table.setAttribute("aria-rowcount", this.order.length + 1);
    if (held) this.focus();
  }

  focus() {
    const link = this.body.querySelector(`a[data-at="${this.active}"]`);
    (link ?? this.scroller).focus({preventScroll: true});
  }

  /** Move the marked row by so many, or to the first or last. */
  move(by) {
    if (!this.order.length) return;
    const top = Math.ceil(this.scroller.scrollTop / this.height);
    const from = this.active < 0 ? (by > 0 ? top - 1 : top) : this.active;
    this.active = Math.max(0, Math.min(this.order.length - 1, from + by));
    const head = this.table.tHead.offsetHeight, at = this.active * this.height;
    const room = this.scroller.clientHeight - head - this.height;
    if (at < this.scroller.scrollTop) this.scroller.scrollTop = at;
    else if (at > this.scroller.scrollTop + room) this.scroller.scrollTop = at - room;
    this.draw();
    this.focus();
    this.scroller.scrollIntoView({block: "nearest"});
  }

  keys() {
    const page = () => Math.max(1, Math.floor(this.scroller.clientHeight / this.height) - 2);
    return {
      j: () => this.move(1), k: () => this.move(-1), ArrowDown: () => this.move(1), ArrowUp: () => this.move(-1),
      PageDown: () => this.move(page()), PageUp: () => this.move(-page()),
      Home: () => this.move(-Infinity), End: () => this.move(Infinity),
      Enter: () => {
        const link = this.body.querySelector(`a[data-at="${Math.max(this.active, 0)}"]`);
        if (link) link.click();
      },
    };
  }
};
