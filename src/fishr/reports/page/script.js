"use strict";

// Charts are read and drawn when they come into view; their colors follow the page's.
const plots = document.querySelectorAll(".plot");

const onPaper = { "--page": "#ffffff", "--text": "#000000", "--line": "#bbbbbb" };
let printing = false;

function withColors(layout) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => (printing ? onPaper[name] : style.getPropertyValue(name).trim());
  const themed = {
    ...layout,
    paper_bgcolor: color("--page"),
    plot_bgcolor: color("--page"),
    font: { ...layout.font, color: color("--text") },
  };
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    themed[name] = {
      ...layout[name],
      gridcolor: color("--line"),
      zerolinecolor: color("--line"),
      linecolor: color("--line"),
    };
  }
  return themed;
}

function isShown(plot, trace) {
  const boxes = plot.closest(".group").querySelectorAll(".toggles input");
  return [...boxes].every((box) => box.checked || box.value !== trace.meta);
}

function draw(plot) {
  const { data, layout } = JSON.parse(plot.closest("figure").querySelector("script").textContent);
  const traces = data.map((trace) => ({ ...trace, visible: isShown(plot, trace) }));
  plot.dataset.drawn = "";
  return Plotly.react(plot, traces, withColors(layout), { responsive: true, displayModeBar: false });
}

const inView = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((each) => each.isIntersecting)) {
      inView.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "300px" },
);
plots.forEach((plot) => inView.observe(plot));

function drawAgain() {
  document.querySelectorAll(".plot[data-drawn]").forEach(draw);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
let folded = [];
addEventListener("beforeprint", () => {
  printing = true;
  folded = [...document.querySelectorAll("details.group:not([open])")];
  folded.forEach((group) => (group.open = true));
  plots.forEach(draw);
});
addEventListener("afterprint", () => {
  printing = false;
  folded.forEach((group) => (group.open = false));
  drawAgain();
});

for (const toggles of document.querySelectorAll(".toggles")) {
  toggles.addEventListener("change", () => {
    toggles.closest(".group").querySelectorAll(".plot[data-drawn]").forEach(draw);
  });
}

// Tables are sorted by the column whose heading is pressed; once more turns the order round.
function sortKey(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = /^[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?(?=$|[\s%(])/i.exec(text);
  return number ? Number(number[0].replaceAll(",", "")) : text;
}

function compare(one, other) {
  if (typeof one === typeof other) {
    return typeof one === "number" ? one - other : one.localeCompare(other);
  }
  return typeof one === "number" ? 1 : -1;
}

for (const button of document.querySelectorAll(".sortable thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const body = heading.closest("table").tBodies[0];
    const ascending = heading.getAttribute("aria-sort") === "descending";
    for (const other of heading.parentNode.children) {
      other.removeAttribute("aria-sort");
    }
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const sign = ascending ? 1 : -1;
    const column = heading.cellIndex;
    const sorted = [...body.rows].sort((a, b) => sign * compare(sortKey(a, column), sortKey(b, column)));
    body.append(...sorted);
  });
}

// A page that is served while runs are made looks for news, and keeps what the reader has opened and chosen.
if ("version" in document.body.dataset) {
  const states = { open: "details", checked: "input" };
  for (const [state, tag] of Object.entries(states)) {
    const elements = [...document.querySelectorAll(tag)];
    const kept = JSON.parse(sessionStorage.getItem(state) ?? "[]");
    if (kept.length === elements.length) {
      elements.forEach((element, index) => (element[state] = kept[index]));
    }
  }
  setInterval(async () => {
    const response = await fetch("version", { cache: "no-store" }).catch(() => undefined);
    if (response?.ok && (await response.text()) !== document.body.dataset.version) {
      for (const [state, tag] of Object.entries(states)) {
        const values = [...document.querySelectorAll(tag)].map((element) => element[state]);
        sessionStorage.setItem(state, JSON.stringify(values));
      }
      location.reload();
    }
  }, 3000);
}
