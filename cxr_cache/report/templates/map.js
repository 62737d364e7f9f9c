"use strict";
/* Draws the map of a store on a canvas, and says what is known of the image that one points at.
   All of it comes from the block of data; nothing is fetched. */
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const shorts = (text) => {
    const raw = bytes(text);
    return Float64Array.from({ length: raw.length / 2 }, (_, i) => raw[2 * i] + 256 * raw[2 * i + 1]);
  };
  const count = (n) => n.toLocaleString("en-US");
  const places = shorts(data.places).map((value) => value / 65535);
  const shares = data.unlikeness && shorts(data.unlikeness).map((value) => value / 65535);
  const unusual = new Set(data.unusual);
  const groupings = Object.entries(data.groupings)
    .map(([name, { names, codes }]) => ({ name, names, codes: bytes(codes) }));
  const numberOf = new Map(data.ids.map((id, i) => [id, i]));
  const labels = new Map(); // of findings that were looked at, unpacked

  function labelsOf(finding) {
    if (!labels.has(finding)) {
      const packed = bytes(data.findings[finding].codes);
      labels.set(finding, Uint8Array.from({ length: data.n }, (_, i) => (packed[i >> 2] >> (2 * (i & 3))) & 3));
    }
    return labels.get(finding);
  }

  /* An element with attributes and children; strings become text, never markup. */
  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  // -- groups of points: colour and shape -----------------------------------------------------

  // The first two, blue and orange, differ for every kind of colour vision.
  const STYLES = [["--c0", "circle"], ["--base", "square"], ["--c2", "triangle"], ["--c1", "diamond"], ["--c3", "cross"]];

  function groupByFinding(finding) {
    return {
      of: labelsOf(finding),
      groups: [
        { label: "absent", color: "--c0", shape: "circle", size: 2.2, faint: true },
        { label: "present", color: "--base", shape: "triangle", size: 4 },
        { label: "unlabelled", color: "--muted", shape: "ring", size: 2.4, faint: true },
      ],
      order: [2, 0, 1],
    };
  }

  function groupByColumn({ names, codes }) {
    const other = names.length - 2;
    const groups = names.map((label, k) => ({
      label,
      color: k < other ? STYLES[k][0] : "--muted",
      shape: k < other ? STYLES[k][1] : k === other ? "square" : "ring",
      size: k < other ? 2.8 : 2.4,
      faint: true,
    }));
    return { of: codes, groups, order: groups.map((_, k) => k).reverse() };
  }

  function groupByDistance() {
    const of = Uint8Array.from(shares, (share, i) => (unusual.has(i) ? 3 : share > 0.9 ? 2 : share > 0.5 ? 1 : 0));
    const groups = ["nearer half", "50 to 90 %", "90 to 99 %", "furthest 1 %"].map((label, k) => ({
      label, color: `--far${k}`, shape: k === 3 ? "triangle" : "circle", size: k === 3 ? 4.2 : 2.4, faint: k < 2,
    }));
    return { of, groups, order: [0, 1, 2, 3] };
  }

  const modes = [
    ...(data.findings.length ? [["finding", "finding"]] : []),
    ...groupings.map(({ name }) => [name, name]),
    ...(shares ? [["distance", "distance from the others"]] : []),
  ];

  // -- what is shown now -----------------------------------------------------------------------

  const canvas = find("canvas"), pen = canvas.getContext("2d");
  const view = { scale: 1, x: 0, y: 0 }; // of the map's middle, in parts of it
  let shown = { of: new Uint8Array(data.n), groups: [{ label: "images", color: "--c0", shape: "circle", size: 2.6, faint: true }], order: [0] };
  let hidden = new Set(), kept = null, pointed = null, matches = [], match = -1;

  const visible = (i) => !hidden.has(shown.of[i]);

  /* Pixels of the canvas for a point: one scale for both axes, the middle of the map in the middle. */
  function frame() {
    const width = canvas.clientWidth, height = canvas.clientHeight, margin = 14;
    const [w, h] = data.extent.map((part) => Math.max(part, 1e-6));
    const unit = Math.min((width - 2 * margin) / w, (height - 2 * margin) / h) * view.scale;
    return {
      width, height, unit,
      x: (i) => width / 2 + (places[2 * i] - w / 2 - view.x) * unit,
      y: (i) => height / 2 - (places[2 * i + 1] - h / 2 - view.y) * unit,
    };
  }

  function trace(on, shape, x, y, r) {
    if (shape === "square") on.rect(x - r, y - r, 2 * r, 2 * r);
    else if (shape === "triangle") { on.moveTo(x, y - 1.2 * r); on.lineTo(x + 1.1 * r, y + 0.8 * r); on.lineTo(x - 1.1 * r, y + 0.8 * r); on.closePath(); }
    else if (shape === "diamond") { on.moveTo(x, y - 1.3 * r); on.lineTo(x + 1.3 * r, y); on.lineTo(x, y + 1.3 * r); on.lineTo(x - 1.3 * r, y); on.closePath(); }
    else if (shape === "cross") { on.moveTo(x - r, y - r); on.lineTo(x + r, y + r); on.moveTo(x - r, y + r); on.lineTo(x + r, y - r); }
    else { on.moveTo(x + r, y); on.arc(x, y, r, 0, 2 * Math.PI); }
  }

  const isOpen = (shape) => shape === "ring" || shape === "cross";

  function draw() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const ratio = window.devicePixelRatio || 1, at = frame();
    canvas.width = Math.round(at.width * ratio);
    canvas.height = Math.round(at.height * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const larger = Math.min(1 + 0.35 * Math.log2(view.scale), 2.2) * (data.n > 5000 ? 0.8 : 1);
    for (const k of shown.order) {
      if (hidden.has(k)) continue;
      const group = shown.groups[k];
      pen.globalAlpha = group.faint ? 0.55 : 0.9;
      pen.fillStyle = pen.strokeStyle = color(group.color);
      pen.lineWidth = 1.2;
      for (let i = 0; i < data.n; i++) {
        if (shown.of[i] !== k) continue;
        const x = at.x(i), y = at.y(i);
        if (x < -9 || y < -9 || x > at.width + 9 || y > at.height + 9) continue;
        pen.beginPath();
        trace(pen, group.shape, x, y, group.size * larger);
        if (isOpen(group.shape)) pen.stroke(); else pen.fill();
      }
    }
    pen.globalAlpha = 1;
    const one = pointed ?? kept;
    if (one !== null) {
      pen.strokeStyle = color("--ink");
      data.studies.forEach((study, i) => {
        if (study !== data.studies[one] || !visible(i)) return;
        pen.lineWidth = i === one ? 2.5 : 1.2;
        pen.beginPath();
        trace(pen, "ring", at.x(i), at.y(i), i === one ? 8 : 6);
        pen.stroke();
      });
    }
  }

  let asked = false;
  function redraw() { // once for all changes of a moment
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; draw(); });
  }

  // -- one image -------------------------------------------------------------------------------

  function describe() {
    const i = pointed ?? kept, panel = find("one");
    panel.replaceChildren();
    if (i === null) {
      panel.append(make("p", {}, "No image is pointed at."));
      return;
    }
    const rows = [["study", data.studies[i]]];
    if (data.patients) rows.push(["patient", data.patients[i] || "unknown"]);
    for (const { name, names, codes } of groupings) rows.push([name, names[codes[i]]]);
    const present = data.findings.filter((_, f) => labelsOf(f)[i] === 1).map(({ name }) => name);
    const isLabelled = data.findings.some((_, f) => labelsOf(f)[i] !== 2);
    rows.push(["findings", present.join(", ") || (isLabelled ? "none labelled present" : "unlabelled")]);
    if (shares) rows.push(["distance", `${(100 * shares[i]).toFixed(1)} % quantile`]);
    panel.append(make("h2", {}, data.ids[i]));
    const picture = data.pictures[i];
    if (picture) panel.append(make("img", { src: picture, alt: `Radiograph ${data.ids[i]}`, width: 144, height: 144 }));
    else if (Object.keys(data.pictures).length) panel.append(make("p", {}, "No picture of this image is on the page."));
    panel.append(make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
  }

  function point(i) {
    if (i === pointed) return;
    pointed = i;
    describe();
    redraw();
  }

  function keep(i) {
    kept = i;
    pointed = null;
    if (i !== null) bringIntoView(i);
    describe();
    redraw();
  }

  function bringIntoView(i) {
    const at = frame(), x = at.x(i), y = at.y(i), edge = 20;
    if (x < edge || y < edge || x > at.width - edge || y > at.height - edge) {
      view.x = places[2 * i] - data.extent[0] / 2;
      view.y = places[2 * i + 1] - data.extent[1] / 2;
    }
  }

  /* The visible image nearest to a place of the canvas, at most so many pixels away. */
  function nearest(x, y, reach, allowed = () => true) {
    const at = frame();
    let best = null, least = reach * reach;
    for (let i = 0; i < data.n; i++) {
      const dx = at.x(i) - x, dy = at.y(i) - y, square = dx * dx + dy * dy;
      if (square < least && visible(i) && allowed(i, dx, dy)) { best = i; least = square; }
    }
    return best;
  }

  /* The nearest image within 45 degrees of a direction; images on the very same spot are passed. */
  function step(right, up) {
    const at = frame();
    if (kept === null) { keep(nearest(at.width / 2, at.height / 2, Infinity)); return; }
    const next = nearest(at.x(kept), at.y(kept), Infinity, (i, dx, dy) => {
      const along = right * dx - up * dy, across = Math.abs(up * dx) + Math.abs(right * dy);
      return i !== kept && along > 1e-9 && across <= along;
    });
    if (next !== null) keep(next);
  }

  // -- zoom, pointer and keys --------------------------------------------------------------------

  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const { width, height, unit } = frame();
    const scale = Math.min(Math.max(view.scale * factor, 1), 60);
    const wider = 1 / unit - view.scale / (unit * scale); // what a pixel loses, in parts of the map
    view.x += (x - width / 2) * wider;
    view.y -= (y - height / 2) * wider;
    view.scale = scale;
    if (scale === 1) view.x = view.y = 0;
    canvas.classList.toggle("zoomed", scale > 1);
    redraw();
  }

  const home = () => zoom(0);
  let drag = null;

  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.offsetX, y: event.offsetY, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    const { offsetX: x, offsetY: y } = event;
    if (drag && event.buttons && (drag.moved || Math.hypot(x - drag.x, y - drag.y) > 5)) {
      const { unit } = frame();
      if (view.scale > 1) {
        view.x -= (x - drag.x) / unit;
        view.y += (y - drag.y) / unit;
      }
      drag = { x, y, moved: true };
      redraw();
    } else if (event.pointerType === "mouse") {
      point(nearest(x, y, 14));
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) keep(nearest(event.offsetX, event.offsetY, event.pointerType === "mouse" ? 14 : 26));
    drag = null;
  });
  canvas.addEventListener("pointercancel", () => { drag = null; });
  canvas.addEventListener("pointerleave", () => { drag = null; point(null); });
  canvas.addEventListener("dblclick", (event) => zoom(2, event.offsetX, event.offsetY));
  const keys = {
    ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, 1), ArrowDown: () => step(0, -1),
    "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: home, Escape: () => keep(null),
  };
  canvas.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  find("closer").addEventListener("click", () => zoom(1.5));
  find("wider").addEventListener("click", () => zoom(1 / 1.5));
  find("whole").addEventListener("click", home);

  // -- controls ----------------------------------------------------------------------------------

  function swatch(group) {
    const small = make("canvas", { width: 28, height: 28, "aria-hidden": "true" });
    const on = small.getContext("2d");
    on.fillStyle = on.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue(group.color).trim();
    on.lineWidth = 3;
    on.beginPath();
    trace(on, group.shape, 14, 14, 9);
    if (isOpen(group.shape)) on.stroke(); else on.fill();
    return small;
  }

  function drawLegend() {
    const counts = new Array(shown.groups.length).fill(0);
    shown.of.forEach((k) => { counts[k] += 1; });
    find("legend").replaceChildren(...shown.groups.flatMap((group, k) => {
      if (!counts[k]) return [];
      const box = make("input", { type: "checkbox" });
      box.checked = !hidden.has(k);
      box.addEventListener("change", () => {
        if (box.checked) hidden.delete(k); else hidden.add(k);
        redraw();
      });
      return [make("li", {}, make("label", {}, box, swatch(group), group.label, make("span", {}, count(counts[k]))))];
    }));
  }

  function regroup() {
    const mode = find("mode").value;
    if (mode === "finding") shown = groupByFinding(Number(find("finding").value));
    else if (mode === "distance") shown = groupByDistance();
    else if (mode) shown = groupByColumn(groupings.find(({ name }) => name === mode));
    hidden = new Set();
    find("finding-label").hidden = mode !== "finding";
    drawLegend();
    redraw();
  }

  function search(forward) {
    const wanted = find("search").value.trim().toLowerCase(), said = find("found");
    if (!wanted) { said.textContent = ""; return; }
    if (!forward) {
      match = -1;
      const has = (text) => text.toLowerCase().includes(wanted);
      matches = data.ids.flatMap((id, i) => (has(id) || data.studies[i].toLowerCase() === wanted
        || (data.patients && data.patients[i].toLowerCase() === wanted) ? [i] : []));
    }
    if (!matches.length) { said.textContent = "no image on the map"; return; }
    match = (match + 1) % matches.length;
    said.textContent = `${count(match + 1)} of ${count(matches.length)}${matches.length > 1 ? "; Enter: the next" : ""}`;
    keep(matches[match]);
  }
  find("search").addEventListener("keydown", (event) => { if (event.key === "Enter") search(true); });
  find("search").addEventListener("input", () => search(false));

  for (const [value, label] of modes) find("mode").append(make("option", { value }, label));
  const present = data.findings.map((_, f) => labelsOf(f).reduce((sum, code) => sum + (code === 1), 0));
  data.findings.forEach(({ name }, f) => find("finding").append(make("option", { value: f }, `${name} (${count(present[f])})`)));
  // First the most frequent one that does not cover the map.
  const often = present.map((n) => (n > data.n / 4 ? -1 : n));
  if (often.length) find("finding").selectedIndex = often.indexOf(Math.max(...often));
  find("mode").addEventListener("change", regroup);
  find("finding").addEventListener("change", regroup);
  for (const button of document.querySelectorAll("button[data-image]")) {
    button.addEventListener("click", () => {
      keep(numberOf.get(button.dataset.image));
      find("map").scrollIntoView();
      canvas.focus({ preventScroll: true });
    });
  }
  new ResizeObserver(redraw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawLegend(); redraw(); });
  describe();
  regroup();
})();
