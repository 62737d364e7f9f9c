"use strict";
/* Draws the curves, and makes the table of findings sortable, filterable and expandable.
   All numbers come from the block of data; nothing is fetched. */
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const several = data.runs.length > 1;
  const SVG = "http://www.w3.org/2000/svg";

  // -- small tools ---------------------------------------------------------------------------

  /* An element with attributes and children; strings become text, never markup. */
  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    return fill(element, attributes, children);
  }

  function draw(name, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, name), attributes, children);
  }

  function fill(element, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  const fixed = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
  const count = (value) => (value === null ? "–" : value.toLocaleString("en-US"));

  /* About n round numbers from low to high. */
  function ticks(low, high, n) {
    const raw = (high - low) / n;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
    const places = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) {
      places.push(Number((k * step).toPrecision(10)));
    }
    return places;
  }

  // -- line charts ---------------------------------------------------------------------------

  /* spec: x and y {min, max, label, ticks?}, lines [{points, style}], dots [{at, style, words}],
     rules [{points}] for baselines, a band [[x, low, high]]; words for those who cannot see it. */
  function chart(spec) {
    const width = 320, height = 260;
    const left = 46, right = 12, top = 10, bottom = 42;
    const x = (value) => left + ((value - spec.x.min) / (spec.x.max - spec.x.min)) * (width - left - right);
    const y = (value) => height - bottom - ((value - spec.y.min) / (spec.y.max - spec.y.min)) * (height - top - bottom);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.words });
    for (const place of spec.y.ticks || ticks(spec.y.min, spec.y.max, 5)) {
      svg.append(
        draw("line", { class: "grid", x1: left, x2: width - right, y1: y(place), y2: y(place) }),
        draw("text", { x: left - 6, y: y(place) + 4, "text-anchor": "end" }, String(place)),
      );
    }
    for (const place of spec.x.ticks || ticks(spec.x.min, spec.x.max, 5)) {
      svg.append(
        draw("line", { class: "grid", x1: x(place), x2: x(place), y1: top, y2: height - bottom }),
        draw("text", { x: x(place), y: height - bottom + 16, "text-anchor": "middle" }, String(place)),
      );
    }
    svg.append(
      draw("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
      draw("line", { class: "axis", x1: left, x2: left, y1: top, y2: height - bottom }),
      draw("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, spec.x.label),
      draw("text", { x: 11, y: (top + height - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${(top + height - bottom) / 2})` }, spec.y.label),
    );
    const path = (points) =>
      points.filter(([a, b]) => a !== null && b !== null)
        .map(([a, b], k) => `${k ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    const inside = (spec.band || []).filter((place) => place.every((value) => value !== null))
      .map(([a, ...bounds]) => [a, ...bounds.map((b) => Math.min(Math.max(b, spec.y.min), spec.y.max))]);
    if (inside.length > 1) {
      const edge = [...inside.map(([a, low]) => [a, low]), ...inside.map(([a, , high]) => [a, high]).reverse()];
      svg.append(draw("path", { class: "band", d: `${path(edge)}Z` }));
    }
    for (const rule of spec.rules || []) svg.append(draw("path", { class: "base", d: path(rule.points) }));
    for (const line of spec.lines) svg.append(draw("path", { class: `line ${line.style}`, d: path(line.points) }));
    for (const dot of spec.dots || []) {
      if (dot.at[0] === null || dot.at[1] === null) continue;
      svg.append(draw("circle", { class: `dot ${dot.style}`, cx: x(dot.at[0]), cy: y(dot.at[1]), r: dot.size || 5 },
        draw("title", {}, dot.words)));
    }
    return svg;
  }

  function figure(title, remark, svg) {
    return make("figure", { class: "chart" }, make("figcaption", {}, title, make("span", {}, remark)), svg);
  }

  const unit = (label) => ({ min: 0, max: 1, label, ticks: [0, 0.2, 0.4, 0.6, 0.8, 1] });
  const zip = (a, b) => a.map((value, k) => [value, b[k]]);
  const eachRun = (list, use) => list.flatMap((entry, run) => (entry === null ? [] : [use(entry, run)]));

  function rocChart(curves, points, name, band) {
    return chart({
      band: band && band.specificity.map((v, k) => [1 - v, band.sensitivity_low[k], band.sensitivity_high[k]]),
      x: unit("1 − specificity"), y: unit("sensitivity"), words: `ROC curve of ${name}`,
      rules: [{ points: [[0, 0], [1, 1]] }],
      lines: eachRun(curves, (c, run) => ({ style: `s${run}`, points: zip(c.specificity.map((v) => 1 - v), c.sensitivity) })),
      dots: eachRun(points, (p, run) => ({
        style: `f${run}`, at: [p.specificity === null ? null : 1 - p.specificity, p.sensitivity],
        words: `at the threshold: sensitivity ${fixed(p.sensitivity)}, specificity ${fixed(p.specificity)}`,
      })),
    });
  }

  function precisionRecallChart(curves, points, prevalence, name, band) {
    return chart({
      band: band && band.sensitivity.map((v, k) => [v, band.ppv_low[k], band.ppv_high[k]]),
      x: unit("recall (sensitivity)"), y: unit("precision (PPV)"), words: `Precision-recall curve of ${name}`,
      rules: prevalence === null ? [] : [{ points: [[0, prevalence], [1, prevalence]] }],
      lines: eachRun(curves, (c, run) => ({ style: `s${run}`, points: zip(c.sensitivity, c.ppv) })),
      dots: eachRun(points, (p, run) => ({
        style: `f${run}`, at: [p.sensitivity, p.ppv],
        words: `at the threshold: recall ${fixed(p.sensitivity)}, precision ${fixed(p.ppv)}`,
      })),
    });
  }

  /* Bins as dots, larger where they hold more cells. With calibration, what it was before is thin. */
  function calibrationChart(stages, name) {
    const lines = [], dots = [];
    stages.forEach((stage, run) => {
      if (stage === null) return;
      const shown = stage.after || stage.before;
      const largest = Math.max(...shown.n);
      if (stage.after) lines.push({ style: `thin s${run}`, points: zip(stage.before.mean_probability, stage.before.observed) });
      lines.push({ style: `s${run}`, points: zip(shown.mean_probability, shown.observed) });
      shown.n.forEach((n, k) => dots.push({
        style: `f${run}`, at: [shown.mean_probability[k], shown.observed[k]], size: 2.5 + 4 * Math.sqrt(n / largest),
        words: `${count(n)} cells: stated ${fixed(shown.mean_probability[k])}, observed ${fixed(shown.observed[k])}`,
      }));
    });
    return chart({
      x: unit(stages.every((stage) => stage === null || stage.after) ? "stated probability" : "stated score"), y: unit("share that has it"), words: `Calibration of ${name}`,
      rules: [{ points: [[0, 0], [1, 1]] }], lines, dots,
    });
  }

  /* Net benefit of acting from a probability on; dashed: on everything. Acting on nothing has 0. */
  function decisionChart(decisions, name) {
    const first = decisions.find((one) => one !== null);
    const most = Math.max(...decisions.flatMap((one) => (one === null ? [] : [...one.net_benefit, ...one.treat_all])), 1e-4);
    const low = -most / 4, all = zip(first.threshold, first.treat_all), end = all.findIndex(([, b]) => b < low);
    if (end > 0) { // the line ends where it leaves the picture
      const [[a, b], [c, d]] = all.slice(end - 1, end + 1);
      all.splice(end, all.length, [a + ((b - low) / (b - d)) * (c - a), low]);
    }
    return chart({
      x: { min: 0, max: Math.max(...decisions.flatMap((one) => (one === null ? [] : one.threshold))), label: "probability from which on one acts" },
      y: { min: low, max: most * 1.05, label: "net benefit" }, words: `Decision curve of ${name}`,
      band: several ? null : first.threshold.map((v, k) => [v, first.net_benefit_low[k], first.net_benefit_high[k]]),
      rules: [{ points: all }, { points: [[0, 0], [first.threshold.at(-1), 0]] }],
      lines: eachRun(decisions, (one, run) => ({ style: `s${run}`, points: zip(one.threshold, one.net_benefit) })),
    });
  }

  function legend() {
    const items = data.runs.map((run, k) => make("li", {},
      draw("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" }, draw("path", { class: `line s${k}`, d: "M0 5H28" })), run.name));
    return make("ul", { class: "legend" }, ...items);
  }

  // -- one finding ---------------------------------------------------------------------------

  function panel(f) {
    const name = data.findings[f] || "all findings pooled";
    const curves = data.curves.map((of) => of[f]);
    const points = data.points.map((of) => of[f]);
    const stages = data.calibration.map((of) => of[f]);
    const decisions = data.decisions.map((of) => of[f]), band = data.bands.length ? data.bands[0][f] : null;
    const first = points[0], isPooled = f === data.findings.length - 1;
    const box = make("div", { class: "panel" });
    if (data.findings[f]) box.append(make("h3", {}, data.findings[f]));
    if (several) box.append(legend());
    if (curves.some((curve) => curve !== null)) {
      box.append(make("div", { class: "charts" },
        figure("ROC", area(points, "auroc", "AUROC"), rocChart(curves, points, name, band)),
        figure("Precision and recall", area(points, "ap", "AP"), precisionRecallChart(curves, points, first.prevalence_test, name, band)),
        stages.some((stage) => stage !== null) ? figure("Calibration", stages.some((s) => s && s.after) ? "thin: before it was calibrated" : "", calibrationChart(stages, name)) : null,
        decisions.some((one) => one !== null) ? figure("Decision curve", "dashed: acting on all, and on none", decisionChart(decisions, name)) : null));
      if (band) box.append(make("p", { class: "note" }, `Shaded: pointwise 95 % bands. Each holds at its own place (a specificity, a recall, a probability), not for a curve as a whole.${decisions[0] ? " Net benefit: true calls less false ones per image, a false one weighed by the odds of the probability (Vickers and Elkin 2006)." : ""}`));
      box.append(make("p", { class: "note" }, !isPooled
        ? "Dots on the first two curves are the stored threshold; dashed lines are what guessing gets, and perfect calibration. Dots of the calibration curve are tenths of the scale, larger where they hold more."
        : "All labelled cells of all findings taken together. Dashed lines are what guessing gets, and perfect calibration."));
    } else {
      box.append(make("p", { class: "note" }, data.curves.every((of) => of.every((c) => c === null))
        ? "This run was evaluated before curves were kept; `cxr-cache evaluate RUN` and `cxr-cache report RUN` add them."
        : `No curve: the test ${data.rows} hold no positive or no negative.`));
    }
    if (!isPooled) box.append(figures(points));
    box.append(...zeroShot(data.zero_shot.map((of) => of[f])));
    const groups = data.groups.map((of) => of[f]);
    if (groups.some((group) => group !== null)) box.append(groupTable(groups));
    if (data.maps?.by_finding[name]) box.append(make("div", { class: "tools" }, mapSwitch()), make("p", { class: "note" }, ABOUT_MAPS));
    if (data.cases) box.append(...caseRows(name));
    return box;
  }

  function area(points, name, words) {
    const point = points[0];
    if (several) return `${words} ${points.map((one) => fixed(one[name])).join(" · ")}`;
    if (point[name] === null) return "";
    const interval = point[name + "_low"] === null ? " (no interval)" : ` (${fixed(point[name + "_low"])} to ${fixed(point[name + "_high"])})`;
    return `${words} ${fixed(point[name])}${interval}`;
  }

  const AT_THRESHOLD = [
    ["tp", "hits", count], ["fn", "misses", count], ["fp", "false alarms", count], ["tn", "rightly not called", count], ["prevalence_test", "prevalence", fixed],
    ["threshold", "threshold", (v) => (v > 1 ? "never" : fixed(v))],
    ...["sensitivity", "specificity", "ppv", "npv"].map((key) => [key, key.endsWith("v") ? key.toUpperCase() : key, fixed]),
    ...data.measures.map(([key, label]) => [key, label, fixed]),
  ];

  function figures(points) {
    const head = make("tr", {}, make("th", { scope: "col" }, several ? "Run" : `Test ${data.rows}`),
      ...AT_THRESHOLD.map(([, label]) => make("th", { scope: "col" }, label)));
    const rows = points.map((point, run) => make("tr", {}, make("th", { scope: "row" }, several ? data.runs[run].name : `${count(point.n_test)}`),
      ...AT_THRESHOLD.map(([key, , form]) => make("td", {}, point[key] !== null ? form(point[key]) : key === "threshold" ? "too few to decide" : "–"))));
    return table(head, rows, "Figures at the threshold");
  }

  function zeroShot(rows) {
    const sign = (value) => (value > 0 ? "+" : "") + fixed(value);
    const interval = (row, name, form) => (row[name + "_low"] === null ? " (no interval)" : ` (${form(row[name + "_low"])} to ${form(row[name + "_high"])})`);
    return rows.flatMap((row, run) => (row === null || row.zero_shot === null ? [] : [make("p", { class: "zero-shot" },
      `${several ? data.runs[run].name + ": prompts" : "Prompts"} alone, without training, have AUROC ${fixed(row.zero_shot)}${interval(row, "zero_shot", fixed)}; `
      + `the run minus zero-shot is ${sign(row.difference)}${interval(row, "difference", sign)}.`
      + (row.present ? ` They were “${row.present}” against “${row.absent}”.` : ""))]));
  }

  function groupTable(groups) {
    const head = make("tr", {}, ...["Group", ...(several ? ["Run"] : []), "positives", data.rows, "AUROC", "sensitivity", "specificity"]
      .map((label) => make("th", { scope: "col" }, label)));
    const rows = groups.flatMap((group, run) => (group || []).map((row) => make("tr", {},
      make("th", { scope: "row" }, `${row.group.replaceAll("_", " ")} ${row.value}`),
      ...(several ? [make("td", {}, data.runs[run].name)] : []),
      make("td", {}, count(row.n_positive_test)), make("td", {}, count(row.n_test)),
      make("td", {}, fixed(row.auroc), row.auroc === null ? "" : make("span", { class: "interval" }, row.auroc_low === null ? " no interval" : ` ${fixed(row.auroc_low)} to ${fixed(row.auroc_high)}`)),
      make("td", {}, fixed(row.sensitivity)), make("td", {}, fixed(row.specificity)))));
    return table(head, rows, "By group");
  }

  function table(head, rows, label) {
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
      asCards(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
  }

  /* On a narrow screen every row becomes a card, whose cells are named as their columns are. Roles
     keep it a table for screen readers, whatever is displayed. */
  function asCards(made) {
    const heads = [...made.tHead.rows], names = [];
    let group = [];
    heads.forEach((row, level) => {
      let place = 0;
      const above = group;
      group = [];
      for (const cell of row.cells) {
        while (names[place] !== undefined && level && !above[place]) place++;
        for (let k = 0; k < cell.colSpan; k++, place++) {
          names[place] = `${above[place] || ""} ${cell.textContent}`.trim();
          if (cell.colSpan > 1) group[place] = cell.textContent;
        }
      }
    });
    for (const row of [...made.tBodies].flatMap((body) => [...body.rows])) {
      row.setAttribute("role", "row");
      [...row.cells].forEach((cell, k) => {
        cell.setAttribute("role", cell.tagName === "TH" ? "rowheader" : "cell");
        cell.dataset.label = names[k] || "";
        cell.normalize();
      });
    }
    made.setAttribute("role", "table");
    made.classList.add("cards");
    return made;
  }
  document.querySelectorAll(".scroll > table").forEach(asCards);

  // -- cases ---------------------------------------------------------------------------------

  const KINDS = [
    ["hits", "Hits: labelled and called, surest first"],
    ["misses", "Misses: labelled, not called, least likely first"],
    ["false_alarms", "False alarms: called, labelled absent"],
  ];

  function caseRows(name) {
    return data.cases.flatMap((cases, run) => {
      const found = cases[name];
      if (!found) return [];
      const rows = KINDS.map(([kind, words]) => make("div", { class: kind }, make("h4", {}, words),
        found[kind].length ? make("div", { class: "row" }, ...found[kind].map((one) => picture(one, name, words))) : make("p", { class: "note" }, "none")));
      return [...(several ? [make("h4", {}, data.runs[run].name)] : []), make("div", { class: "cases" }, ...rows)];
    });
  }

  function picture(one, name, words) {
    const source = data.pictures[one.image_id];
    const shown = source
      ? make("img", { src: source, alt: `${one.image_id}: ${words.split(":")[0].toLowerCase()} for ${name}, probability ${fixed(one.probability)}`, width: 144, height: 144 })
      : make("div", { class: "blank" }, "no picture");
    const map = source && data.maps ? drawMap(one.image_id, name) : null;
    return make("figure", {}, map ? make("div", { class: "frame" }, shown, map) : shown, make("b", {}, fixed(one.probability)), make("span", { title: one.image_id }, one.image_id));
  }

  const ABOUT_MAPS = "Where it looked: what the model’s answer rests on, not whether the answer is right; with a frozen encoder of random weights it is no better than chance. Each map is scaled to its own maximum, so compare places, not colours.";
  const COLOURS = [[0, 34, 78], [67, 78, 108], [125, 124, 120], [188, 174, 108], [254, 232, 56]]; // cividis
  const STRONGEST = 0.75; // opacity of the maximum; zero is transparent
  const switches = [];

  /* A pixel per patch, which the browser enlarges smoothly. */
  function drawMap(imageId, name) {
    const packed = data.maps.by_finding[name]?.[imageId];
    if (!packed) return null;
    const { rows, columns } = data.maps;
    const values = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const peak = values.indexOf(255);
    const place = peak < 0 ? "" : `, strongest ${Math.round(100 * (peak % columns + 0.5) / columns)} % from the left and ${Math.round(100 * (Math.floor(peak / columns) + 0.5) / rows)} % from the top`;
    const canvas = make("canvas", { width: columns, height: rows, role: "img", "aria-label": `where it looked for ${name}${place}` });
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    values.forEach((value, k) => {
      const share = value / 255, at = share * (COLOURS.length - 1), low = Math.min(Math.floor(at), COLOURS.length - 2);
      const colour = COLOURS[low].map((from, c) => from + (at - low) * (COLOURS[low + 1][c] - from));
      image.data.set([...colour, 255 * STRONGEST * share], 4 * k);
    });
    context.putImageData(image, 0, 0);
    return canvas;
  }

  /* All of them switch the maps of the whole page. */
  function mapSwitch() {
    const page = document.documentElement, box = make("input", { type: "checkbox" });
    box.checked = page.classList.contains("maps");
    box.addEventListener("change", () => {
      page.classList.toggle("maps", box.checked);
      for (const other of switches) other.checked = box.checked;
    });
    switches.push(box);
    return make("label", {}, box, " show where it looked");
  }

  function setUpCases() {
    const chooser = document.getElementById("case-finding"), place = document.getElementById("case-rows");
    if (!chooser || !data.cases) return;
    if (data.maps) {
      chooser.closest(".tools").append(mapSwitch());
      place.before(make("p", { class: "note" }, ABOUT_MAPS));
    }
    const named = data.findings.filter((name) => data.cases.some((cases) => name in cases));
    const positives = (name) => data.points[0][data.findings.indexOf(name)].n_positive_test;
    chooser.append(...named.map((name) => make("option", { value: name }, `${name} (${count(positives(name))})`)));
    chooser.value = named.reduce((best, name) => (positives(name) > positives(best) ? name : best), named[0]);
    const show = () => place.replaceChildren(...caseRows(chooser.value));
    chooser.addEventListener("change", show);
    show();
  }

  // -- the table of findings -----------------------------------------------------------------

  function setUpTable() {
    const findings = document.getElementById("finding-table");
    const bodies = [...findings.tBodies], rows = [...findings.querySelectorAll("tr[data-finding]")];
    const details = new Map();
    const nameOf = (row) => row.querySelector("[data-name]").dataset.name;

    function toggle(button) {
      const row = button.closest("tr"), f = Number(row.dataset.finding);
      if (!details.has(f)) {
        const cell = make("td", { role: "cell", colspan: findings.tHead.rows[0].cells.length }, panel(f));
        details.set(f, make("tr", { class: "detail", id: `detail-${f}` }, cell));
        button.setAttribute("aria-controls", `detail-${f}`);
      }
      const isOpen = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!isOpen));
      if (isOpen) details.get(f).remove();
      else row.after(details.get(f));
      return !isOpen;
    }
    const addressOf = (row) => `#finding=${encodeURIComponent(nameOf(row))}`;
    findings.querySelectorAll("button.open").forEach((button) => button.addEventListener("click", () => {
      const isOpen = toggle(button), row = button.closest("tr");
      if (isOpen || location.hash === addressOf(row)) history.replaceState(null, "", isOpen ? addressOf(row) : "#findings");
    }));

    /* An address that names a finding opens it: `#finding=Edema`. */
    function follow() {
      const named = location.hash.match(/^#finding=(.*)$/);
      if (!named) return;
      let name = named[1];
      try { name = decodeURIComponent(name); } catch { /* as it stands */ }
      const row = rows.find((one) => nameOf(one) === name) || rows.find((one) => nameOf(one).toLowerCase() === name.toLowerCase());
      rows.forEach((one) => one.classList.toggle("lit", one === row));
      if (!row) return;
      if (row.hidden) {
        words.value = "";
        enough.checked = false;
        filter();
      }
      const button = row.querySelector("button.open");
      if (button.getAttribute("aria-expanded") !== "true") toggle(button);
      row.scrollIntoView();
      button.focus({ preventScroll: true });
    }

    /* A cell's value for sorting; blanks go last, whichever way. */
    const valueOf = (row, key) => row.querySelector(`[data-${key}]`)?.getAttribute(`data-${key}`) ?? "";
    function sort(header) {
      const key = header.dataset.key, isText = key === "name";
      const down = header.getAttribute("aria-sort") ? header.getAttribute("aria-sort") === "ascending" : !isText;
      findings.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const compare = (a, b) => {
        const [left, right] = [valueOf(a, key), valueOf(b, key)];
        if (left === "" || right === "") return (left === "") - (right === "");
        return sign * (isText ? left.localeCompare(right, "en", { numeric: true }) : left - right);
      };
      for (const body of bodies) {  // what cannot be judged stays below
        for (const row of rows.filter((one) => one.parentNode === body).sort(compare)) {
          body.append(row);
          const detail = details.get(Number(row.dataset.finding));
          if (detail && detail.isConnected) row.after(detail);
        }
      }
    }
    findings.querySelectorAll("th[data-key] button").forEach((button) =>
      button.addEventListener("click", () => sort(button.closest("th"))));

    const words = document.getElementById("filter"), enough = document.getElementById("enough"), said = document.getElementById("shown");
    function filter() {
      const wanted = words.value.trim().toLowerCase();
      let n = 0;
      for (const row of rows) {
        const isShown = nameOf(row).toLowerCase().includes(wanted) && !(enough.checked && row.classList.contains("few"));
        row.hidden = !isShown;
        const detail = details.get(Number(row.dataset.finding));
        if (detail) detail.hidden = !isShown;
        n += isShown;
      }
      for (const heading of findings.querySelectorAll("tr.group")) {
        heading.hidden = [...heading.parentNode.querySelectorAll("[data-finding]")].every((row) => row.hidden);
      }
      said.textContent = n === rows.length ? "" : `${n} of ${rows.length} ${rows.length === 1 ? "finding" : "findings"}`;
    }
    words.addEventListener("input", filter);
    enough.addEventListener("change", filter);
    filter();
    addEventListener("hashchange", follow);
    follow();
  }

  // -- what is folded away -------------------------------------------------------------------

  /* A link opens what it leads to; paper gets what not to trust, and the limits, opened. */
  function setUpFolds() {
    const folds = [...document.querySelectorAll("details.fold")], all = document.getElementById("open-all");
    all.addEventListener("click", () => {
      const open = folds.some((one) => !one.open);
      for (const one of folds) one.open = open;
    });
    const say = () => { all.textContent = folds.every((one) => one.open) ? "Close all" : "Open all"; };
    for (const one of folds) one.addEventListener("toggle", say);
    function follow(hash) {
      const wanted = /^#[\w-]+$/.test(hash) ? document.querySelector(`${hash} > details.fold`) : null;
      if (!wanted) return;
      wanted.open = true;
      wanted.scrollIntoView();
    }
    // A second click on a link whose section was closed since does not change the address.
    addEventListener("click", (event) => follow(event.target.closest("a")?.hash));
    addEventListener("hashchange", () => follow(location.hash));
    follow(location.hash);
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("#trust details, #limits > details")].filter((one) => !one.open);
      for (const one of opened) one.open = true;
    });
    addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
  }

  // -- search and training -------------------------------------------------------------------

  const extent = (values) => [Math.min(...values), Math.max(...values)];

  /* Round bounds around values, for an axis. */
  function axis(values, label) {
    let [low, high] = extent(values.filter((value) => value !== null));
    if (!(high > low)) [low, high] = [low - Math.abs(low) * 0.1 - 0.01, high + Math.abs(high) * 0.1 + 0.01];
    const places = ticks(low, high, 4), step = places.length > 1 ? places[1] - places[0] : high - low;
    return { min: Math.floor(low / step + 1e-9) * step, max: Math.ceil(high / step - 1e-9) * step, label };
  }

  function drawSearch(place, run) {
    const { epochs, mean, folds, chosen } = data.runs[run].search;
    const [low, high] = extent(epochs), k = epochs.indexOf(chosen);
    place.append(figure("Search", "thin: folds, thick: their mean, dashed: chosen", chart({
      x: { min: low, max: high, label: "epochs", ticks: epochs.length < 9 ? epochs : null },
      y: axis([...mean, ...folds.flat()], "macro AUROC, held-out fold"), words: "Macro AUROC of the held-out folds against epochs",
      rules: k < 0 ? [] : [{ points: [[chosen, axis([...mean, ...folds.flat()]).min], [chosen, axis([...mean, ...folds.flat()]).max]] }],
      lines: [...folds.map((fold) => ({ style: "fold", points: zip(epochs, fold) })), { style: "s0", points: zip(epochs, mean) }],
      dots: zip(epochs, mean).map((at) => ({ style: "f0", at, words: `${at[0]} epochs: ${fixed(at[1], 4)}` })),
    })));
  }

  function drawTraining(place, run) {
    const history = data.runs[run].history;
    const epochs = history.flatMap((fold) => fold.epoch);
    const line = (key, style) => history.filter((fold) => fold[key].some((v) => v !== null))
      .map((fold) => ({ style: `thin ${fold.fold === "final" ? "s1" : style}`, points: zip(fold.epoch, fold[key]) }));
    const x = { min: Math.min(...epochs, 0), max: Math.max(...epochs), label: "epoch" };
    const losses = history.flatMap((fold) => [...fold.train_loss, ...fold.val_loss]);
    place.append(figure("Loss", "line: train, dotted: held out, dashed: final model", chart({
      x, y: axis(losses, "loss"), words: "Loss of train and held-out folds against epochs",
      lines: [...line("train_loss", "s0"), ...line("val_loss", "s2")],
    })));
    const aurocs = history.flatMap((fold) => fold.val_auroc);
    if (aurocs.some((value) => value !== null)) {
      place.append(figure("Macro AUROC", "of every held-out fold", chart({
      x, y: axis(aurocs, "macro AUROC"), words: "Macro AUROC of held-out folds against epochs", lines: line("val_auroc", "s0"),
      })));
    }
  }

  document.querySelectorAll("[data-search]").forEach((place) => {
    const run = Number(place.dataset.search);
    if (data.runs[run].search.epochs.length > 1) drawSearch(place, run);
    drawTraining(place, run);
  });
  document.querySelectorAll("[data-legend]").forEach((place) => place.append(legend()));
  const pooled = document.getElementById("pooled");
  if (pooled) pooled.append(panel(data.findings.length - 1));
  setUpFolds();
  setUpTable();
  setUpCases();
})();
