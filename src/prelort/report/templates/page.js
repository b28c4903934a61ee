// Draws each chart once its place is visible: inside a closed <details> it has no width.
const specifications = JSON.parse(document.getElementById("specifications").textContent);
const options = { mode: "vega-lite", renderer: "svg", ast: true,
  actions: { export: true, source: false, compiled: false, editor: false } };
function draw(root) {
  for (const place of root.querySelectorAll("[data-chart]")) {
    if (place.dataset.drawn || place.closest("details:not([open])")) continue;
    place.dataset.drawn = "yes";
    vegaEmbed(place, specifications[place.dataset.chart], options);
  }
}
draw(document);
for (const details of document.querySelectorAll("details")) {
  details.addEventListener("toggle", () => draw(details));
}
