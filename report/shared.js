"use strict";
// What both pages use: the data that they hold, choices, colours that can be seen on a dark ground.

const given = name => JSON.parse(document.getElementById(`data-${name}`).textContent);
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");

function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Calls `show` with what is chosen, now and whenever it changes.
function choose(id, show) {
  const choice = document.getElementById(id);
  if (choice) { choice.onchange = () => show(Number(choice.value)); show(Number(choice.value)); }
}

function luminance(color) {
  const parts = color.match(/[0-9a-f]{2}/gi).map(part => parseInt(part, 16) / 255);
  const [r, g, b] = parts.map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// The same colour, on a dark ground lightened until it can be told from it (a contrast of 3 to 1); of greys the opposite one.
function readable(color) {
  if (!dark.matches) return color;
  const parts = color.match(/[0-9a-f]{2}/gi).map(part => parseInt(part, 16)), ground = luminance(style("--ground"));
  const hex = values => "#" + values.map(value => Math.round(value).toString(16).padStart(2, "0")).join("");
  const enough = shade => (luminance(shade) + 0.05) / (ground + 0.05) >= 3;
  if (enough(color)) return color;
  if (new Set(parts).size === 1) return hex(parts.map(part => 255 - part));
  for (let share = 0.05; share < 1; share += 0.05) {
    const shade = hex(parts.map(part => part + (255 - part) * share));
    if (enough(shade)) return shade;
  }
  return "#ffffff";
}

// All icons in colours that can be seen on the present ground.
function colorIcons() {
  document.querySelectorAll(".mark").forEach(mark => {
    const color = mark.style.getPropertyValue("--mark").trim();
    if (color) mark.firstElementChild.style.fill = readable(color);
  });
}
dark.addEventListener("change", colorIcons);

// A marker of the charts as a small picture.
function icon(mark) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg"), path = document.createElementNS(made.namespaceURI, "path");
  made.setAttribute("viewBox", "-1.6 -1.6 3.2 3.2");
  made.setAttribute("class", "mark");
  made.setAttribute("aria-hidden", "true");
  path.setAttribute("d", mark.path);
  path.setAttribute("transform", `scale(${mark.scale})`);
  made.style.setProperty("--mark", mark.color);
  path.style.fill = readable(mark.color);
  made.append(path);
  return made;
}

// Marks every box whose content goes on: `data-more` says where (the box fades there), and a line above a table names it.
function watchScrolling() {
  for (const box of document.querySelectorAll(".scroller, .top nav")) {
    const line = node("p", { className: "onward hint", hidden: true });
    if (box.matches(".scroller")) box.before(line);
    const look = () => {
      const across = box.scrollWidth - box.clientWidth, along = box.scrollHeight - box.clientHeight;
      const more = { left: box.scrollLeft > 1, right: across - box.scrollLeft > 1, down: along - box.scrollTop > 1 };
      const where = Object.keys(more).filter(side => more[side]).join(" ");
      if (box.dataset.more !== where) box.dataset.more = where;
      const said = [more.right ? "more columns →" : "", more.down ? "more rows ↓" : ""].filter(Boolean).join(", ") || "\u00a0";
      if (line.textContent !== said) line.textContent = said;
      if (line.hidden !== (across <= 1 && along <= 1)) line.hidden = !line.hidden;
    };
    box.addEventListener("scroll", look, { passive: true });
    const sizes = new ResizeObserver(look);
    sizes.observe(box);
    if (box.firstElementChild) sizes.observe(box.firstElementChild);
  }
}
