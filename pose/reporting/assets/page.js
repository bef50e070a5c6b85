// Draws the charts, and lets the tables be sorted and filtered. Which models are shown is one state for both.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const off = new Set(read("hidden")); // by the reader, or from the start
  const filtered = new Set(); // by the filter
  const views = [];

  const config = {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal", labelColor: "#5b6570", titleColor: "#5b6570",
            gridColor: "#dfe3e7", domainColor: "#dfe3e7", tickColor: "#dfe3e7" },
    legend: { labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal" },
  };
  const options = {
    renderer: "svg", // sharp when printed, and its text is read by screen readers
    config,
    logLevel: vega.Error, // a chart of which every line is hidden would be warned of
    actions: { export: true, source: false, compiled: false, editor: false },
  };

  function show() {
    const hidden = [...new Set([...off, ...filtered])];
    for (const toggle of all(".toggle")) {
      const line = toggle.dataset.line ?? toggle.closest("tr").dataset.line;
      toggle.setAttribute("aria-pressed", String(!off.has(line)));
      if (toggle.dataset.line !== undefined) toggle.hidden = filtered.has(line);
    }
    for (const figure of all("figure[data-line]")) figure.hidden = hidden.includes(figure.dataset.line);
    return Promise.all(views.map((view) => view.signal("hidden", hidden).runAsync()));
  }

  function focus(line) {
    for (const view of views) view.signal("focus", line).runAsync();
  }

  for (const toggle of all(".toggle")) {
    const line = toggle.dataset.line ?? toggle.closest("tr").dataset.line;
    toggle.addEventListener("click", () => {
      if (!off.delete(line)) off.add(line);
      show();
    });
    toggle.addEventListener("pointerenter", () => focus(off.has(line) ? "" : line));
    toggle.addEventListener("pointerleave", () => focus(""));
  }

  // A row is kept where it has every word, in whatever order.
  const filter = document.getElementById("filter");
  const rows = all("#models tbody tr");
  function count() {
    document.getElementById("count").textContent = `${rows.length - filtered.size} of ${rows.length}`;
  }
  filter?.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    filtered.clear();
    for (const row of rows) {
      const text = `${row.dataset.line} ${row.dataset.about}`.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      if (row.hidden) filtered.add(row.dataset.line);
    }
    count();
    show();
  });
  if (filter) count();

  const families = document.getElementById("families");
  families?.addEventListener("change", () => {
    const main = new Set(all("#models [data-main=true]").map((head) => head.dataset.family));
    for (const cell of all("#models [data-family]")) {
      const { family } = cell.dataset;
      const isShown = { all: true, main: main.has(family) }[families.value] ?? family === families.value;
      cell.hidden = !isShown;
    }
  });

  // The best, or the first of the alphabet, at the top; a second click turns it around. Empty cells come last.
  for (const table of all("table.sortable")) {
    for (const button of all("thead button", table)) {
      button.addEventListener("click", () => {
        const head = button.closest("th");
        // A cell's place in its row: that of its head among those that are sorted by
        const column = all("thead button", table).indexOf(button) + (table.querySelector("thead th:empty") ? 1 : 0);
        const first = head.dataset.first ?? "ascending";
        const second = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? second : first;
        for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        const key = (row) => {
          const cell = row.cells[column];
          if (cell.dataset.value !== undefined) return cell.dataset.value === "" ? null : Number(cell.dataset.value);
          const text = (cell.querySelector(".name") ?? cell).textContent.trim(); // without the mark of its line
          return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
        };
        const sign = order === "ascending" ? 1 : -1;
        const compare = (a, b) => {
          if (a === null || b === null) return (a === null) - (b === null);
          if (typeof a === "number" && typeof b === "number") return sign * (a - b);
          return sign * String(a).localeCompare(String(b), undefined, { numeric: true });
        };
        const body = table.tBodies[0];
        const sorted = [...body.rows].map((row) => [key(row), row]);
        body.append(...sorted.sort((a, b) => compare(a[0], b[0])).map(([, row]) => row));
      });
    }
  }

  async function draw(spec, i) {
    const place = document.getElementById(`chart-${i}`);
    try {
      const { view } = await vegaEmbed(place, { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...spec }, options);
      if (spec.params) views.push(view);
    } catch (error) {
      place.textContent = `This chart cannot be drawn: ${error.message}`;
      console.error(error);
    }
  }
  Promise.all(read("specs").map(draw))
    .then(show)
    .then(() => (document.documentElement.dataset.drawn = "true"));
})();
