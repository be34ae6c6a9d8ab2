"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const config = {
    background: null,
    view: { stroke: null },
    axis: { gridColor: "#9ca3af44", domainColor: "#9ca3af", tickColor: "#9ca3af" },
    legend: { orient: "top", columns: Math.max(2, Math.floor(root.clientWidth / 110)), symbolType: "square" },
    font: "system-ui, sans-serif",
  };

  function setTheme(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    theme.setAttribute("aria-pressed", String(dark));
  }
  theme.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));
  setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches);

  const numeric = new Set(["bytes", "us"]);
  const size = (bytes) => {
    const power = [["GiB", 30], ["MiB", 20], ["KiB", 10]].find(([, p]) => bytes >= 2 ** p);
    return power ? `${(bytes / 2 ** power[1]).toFixed(2)} ${power[0]}` : `${bytes} B`;
  };
  const texts = data.rows.map((row) => row.join(" ").toLowerCase());
  const head = document.querySelector("#values thead tr");
  const body = document.querySelector("#values tbody");
  const [count, search] = ["count", "search"].map((id) => document.getElementById(id));
  const [previous, next] = ["previous", "next"].map((id) => document.getElementById(id));
  const page = 100;
  let order = data.rows.map((_, i) => i), sorted = -1, rising = true, start = 0;

  function cell(name, value) {
    const made = document.createElement(name === "value" ? "th" : "td");
    if (name === "value") made.scope = "row";
    made.textContent = name === "bytes" ? size(value) : value;
    if (numeric.has(name)) made.className = "number";
    if (name === "decision") made.className = `decision ${value}`;
    return made;
  }
  function draw() {
    const rows = order.slice(start, start + page).map((i) => {
      const row = document.createElement("tr");
      row.append(...data.rows[i].map((value, c) => cell(data.columns[c], value)));
      return row;
    });
    body.replaceChildren(...rows);
    const last = Math.min(start + page, order.length);
    count.textContent = order.length ? `${start + 1} to ${last} of ${order.length}` : "none";
    previous.disabled = start === 0;
    next.disabled = last === order.length;
  }
  function select() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    order = data.rows.map((_, i) => i).filter((i) => words.every((word) => texts[i].includes(word)));
    if (sorted >= 0) {
      const way = rising ? 1 : -1;
      const by = numeric.has(data.columns[sorted])
        ? (a, b) => a - b
        : (a, b) => (a < b ? -1 : a > b ? 1 : 0);
      order.sort((a, b) => way * by(data.rows[a][sorted], data.rows[b][sorted]) || a - b);
    }
    start = 0;
    draw();
  }
  data.columns.forEach((name, c) => {
    const th = document.createElement("th");
    th.scope = "col";
    if (numeric.has(name)) th.className = "number";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      rising = sorted === c ? !rising : !numeric.has(name);
      sorted = c;
      [...head.children].forEach((other) => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", rising ? "ascending" : "descending");
      button.dataset.way = rising ? "▲" : "▼";
      select();
    });
    th.append(button);
    head.append(th);
  });
  search.addEventListener("input", select);
  previous.addEventListener("click", () => { start -= page; draw(); });
  next.addEventListener("click", () => { start += page; draw(); });
  select();
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));

  const charts = Object.entries(data.charts).map(([id, spec]) =>
    window.vegaEmbed(document.getElementById(id), spec, { renderer: "svg", actions: false, config }));
  Promise.all(charts).then(() => { root.dataset.ready = "true"; });
})();
