"use strict";
// Pointing at a chart shows the nearest step's value in the place of the last one.
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg");
  const output = figure.querySelector("output");
  const cursor = svg.querySelector(".cursor");
  const points = JSON.parse(svg.dataset.points);
  if (points.length === 0) continue;
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const [x, step, value] = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.removeAttribute("hidden");
    output.textContent = `${step}: ${value}`;
    output.classList.add("pointed");
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("hidden", "");
    output.textContent = output.dataset.last;
    output.classList.remove("pointed");
  });
}
