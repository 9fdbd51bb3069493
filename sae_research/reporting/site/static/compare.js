"use strict";
// The page of two runs: one table for the metric that is chosen, and the charts.

function start() {
  const marks = given("marks"), tables = given("tables");
  choose("metric-choice", index => {
    document.getElementById("metric-about").textContent = tables[index].about;
    resultsTable(document.getElementById("compare-table"), { ...tables[index], marks }, { flags: true, limit: "change>0" });
  });
  document.querySelectorAll("[data-metric]").forEach(link => link.addEventListener("click", () => {
    const choice = document.getElementById("metric-choice");
    choice.value = tables.findIndex(table => table.title === link.dataset.metric);
    choice.onchange();
  }));
  colorIcons();
  watchScrolling();
  watchCharts(given("datasets"), given("datasets").sides.length > 400);
  document.body.dataset.ready = "yes";
}
start();
