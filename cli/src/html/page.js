// Tells, in every panel at once, what the figures are at the time under the pointer.
// No sign of less-than or ampersand, so that the page reads as XML too.
const data = JSON.parse(document.getElementById("data").textContent);
const three = (number) => number.toLocaleString("en", { maximumSignificantDigits: 3 });
const time = (ns) => {
  if (ns === 0) return "0";
  if (ns >= 1e9) return three(ns / 1e9) + " s";
  if (ns >= 1e6) return three(ns / 1e6) + " ms";
  return ns >= 1e3 ? three(ns / 1e3) + " µs" : three(ns) + " ns";
};
const shown = (value, unit) => {
  if (value === null || value === undefined) return "–";
  return unit === "ns" ? time(value) : value.toLocaleString("en") + " " + unit;
};
const boxes = data.panels.map((panel) => {
  const plot = document.getElementById(panel.id);
  const box = document.createElement("div");
  const cursor = document.createElement("div");
  box.className = "readout";
  cursor.className = "cursor";
  box.hidden = cursor.hidden = true;
  plot.append(cursor, box);
  plot.addEventListener("pointermove", (event) => {
    const place = plot.getBoundingClientRect();
    show(Math.min(Math.max((event.clientX - place.left) / place.width, 0), 0.9999));
  });
  plot.addEventListener("pointerleave", () => show(null));
  return { panel, box, cursor };
});
function show(part) {
  for (const { panel, box, cursor } of boxes) {
    box.hidden = cursor.hidden = part === null;
    if (part === null) continue;
    const at = part * data.end;
    const column = Math.floor(at / panel.width);
    cursor.style.left = part * 100 + "%";
    box.style.left = part > 0.5 ? "0" : "auto";
    box.style.right = part > 0.5 ? "auto" : "0";
    const head = document.createElement("b");
    head.textContent = at.toLocaleString("en", { maximumFractionDigits: 1 }) + " s";
    const lines = panel.lines.map((line) => {
      const row = document.createElement("div");
      const swatch = document.createElement("i");
      swatch.className = line.class;
      row.append(swatch, line.name + " " + shown(line.values[column], panel.unit));
      return row;
    });
    box.replaceChildren(head, ...lines);
  }
}
