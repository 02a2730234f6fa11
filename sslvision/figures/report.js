"use strict";
(() => {
  const number = value => Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
  const element = (name, text) => { const made = document.createElement(name); if (text !== undefined) made.textContent = text; return made; };

  // Charts: the values of all lines nearest to the pointer.
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle; else high = middle; }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  for (const figure of document.querySelectorAll("figure.chart")) {
    const data = JSON.parse(figure.dataset.chart), plot = figure.querySelector(".plot");
    const cursor = plot.querySelector(".cursor"), tip = plot.querySelector(".tip");
    const called = x => (data.ticks.find(([place]) => Math.abs(place - x) < 1e-9) ?? [x, number(x)])[1];
    const share = x => data.log ? Math.log(x / data.x[0]) / Math.log(data.x[1] / data.x[0]) : (x - data.x[0]) / (data.x[1] - data.x[0]);
    const show = event => {
      const box = plot.getBoundingClientRect();
      const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const x = data.log ? data.x[0] * Math.pow(data.x[1] / data.x[0], part) : data.x[0] + part * (data.x[1] - data.x[0]);
      const found = data.lines.map(line => [line, nearest(line.x, x)]);
      const first = found.map(([line, i]) => line.x[i]).sort((a, b) => Math.abs(a - x) - Math.abs(b - x))[0];
      tip.replaceChildren(element("div", `${data.label} ${called(first)}`));
      for (const [line, i] of found) {
        const row = element("div"), mark = element("i");
        mark.className = `c${line.color}`;
        const other = Math.abs(line.x[i] - first) > 1e-9 ? ` (${data.label} ${called(line.x[i])})` : "";
        row.append(mark, `${line.name}: ${number(line.y[i])}${other}`);
        tip.append(row);
      }
      const left = share(first);
      cursor.style.display = tip.style.display = "block";
      cursor.style.left = `${100 * left}%`;
      tip.style.left = left < .5 ? `calc(${100 * left}% + .6rem)` : "auto";
      tip.style.right = left < .5 ? "auto" : `calc(${100 - 100 * left}% + .6rem)`;
    };
    const hide = () => { cursor.style.display = tip.style.display = "none"; };
    plot.addEventListener("pointermove", show);
    plot.addEventListener("pointerdown", show);
    plot.addEventListener("pointerleave", hide);
  }

  // Maps: the image nearest to the pointer, from one sheet of thumbnails.
  for (const figure of document.querySelectorAll("figure.map")) {
    const data = JSON.parse(figure.dataset.map), space = figure.querySelector(".space"), tip = space.querySelector(".tip");
    const ring = space.querySelector(".ring"), thumb = tip.querySelector(".thumb"), told = tip.querySelector(".told");
    let layout = 0, only = null;
    const show = event => {
      const box = space.getBoundingClientRect();
      const x = 1000 * (event.clientX - box.left) / box.width, y = data.height * (event.clientY - box.top) / box.height;
      let best = -1, distance = 60 * 60;
      data.layouts[layout].forEach(([a, b], i) => {
        if (only !== null && data.labels[i] !== only) return;
        const d = (a - x) ** 2 + (b - y) ** 2;
        if (d < distance) { best = i; distance = d; }
      });
      tip.style.display = ring.style.display = best < 0 ? "none" : "block";
      if (best < 0) return;
      const [a, b] = data.layouts[layout][best];
      ring.style.left = `${a / 10}%`; ring.style.top = `${100 * b / data.height}%`;
      const column = best % data.columns, row = Math.floor(best / data.columns);
      thumb.style.backgroundSize = `${100 * data.columns}% ${100 * data.rows}%`;
      thumb.style.backgroundPosition = `${data.columns > 1 ? 100 * column / (data.columns - 1) : 0}% ${data.rows > 1 ? 100 * row / (data.rows - 1) : 0}%`;
      const label = data.labels ? data.labels[best] : -1;
      told.textContent = (label >= 0 ? `${data.classes[label]} · ` : "") + data.names[best];
      tip.style.left = a < 500 ? `calc(${a / 10}% + 14px)` : "auto";
      tip.style.right = a < 500 ? "auto" : `calc(${100 - a / 10}% + 14px)`;
      tip.style.top = 2 * b < data.height ? `${100 * b / data.height}%` : "auto";
      tip.style.bottom = 2 * b < data.height ? "auto" : `${100 - 100 * b / data.height}%`;
    };
    const hide = () => { tip.style.display = ring.style.display = "none"; };
    space.addEventListener("pointermove", show);
    space.addEventListener("pointerdown", show);
    space.addEventListener("pointerleave", hide);
    const press = (buttons, one) => buttons.forEach(button => button.setAttribute("aria-pressed", String(button === one)));
    const choices = [...figure.querySelectorAll(".controls button")];
    choices.forEach((button, i) => button.addEventListener("click", () => {
      layout = i; press(choices, button); hide();
      figure.querySelectorAll("svg g").forEach((group, j) => group.toggleAttribute("hidden", j !== i));
    }));
    const classes = [...figure.querySelectorAll(".legend button")];
    classes.forEach(button => button.addEventListener("click", () => {
      const label = +button.dataset.label;
      only = only === label ? null : label;
      press(classes, only === null ? null : button);
      figure.querySelectorAll("svg path").forEach(path => path.classList.toggle("dim", only !== null && +path.dataset.label !== only));
    }));
  }

  for (const picture of document.querySelectorAll(".picture")) {
    picture.querySelector("img").addEventListener("click", () => picture.classList.toggle("whole"));
  }
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("code").textContent;
      try { await navigator.clipboard.writeText(text); button.textContent = "copied"; }
      catch { button.textContent = "select and copy"; }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  }
  // Details are opened to be printed.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => { one.open = true; }));
})();
