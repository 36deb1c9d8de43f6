"use strict";
(async () => {
  const host = document.getElementById("table");
  if (!host) return;
  const ROW = 30, BINS = 24, MARGIN = 12;
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);

  /* Only textContent and properties are set: no text of the data is ever parsed as HTML. */
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((one) => one != null));
    return element;
  };
  const shape = (tag, attributes) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const unpack = async (id) => {
    const text = atob(byId(id).textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let n = 0; n < bytes.length; n++) bytes[n] = text.charCodeAt(n);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };

  const exact = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 15 });
  const rough = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 5 });
  const whole = new Intl.NumberFormat("en-US");
  const brief = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toPrecision(4).replace(/\.?0+(e|$)/, "$1");
    return rough.format(value);
  };

  let data, meta;
  try {
    meta = JSON.parse(byId("meta").textContent);
    data = await unpack("table-data");
  } catch (error) {
    byId("loading").textContent = `The table cannot be read: ${error.message}. It needs Chrome 80, Firefox 113, Safari 16.4 or later.`;
    return;
  }
  const count = data.rows, items = `${whole.format(count)} ${count === 1 ? "item" : "items"}`;
  const bits = Uint8Array.from(data.bits);

  /* -- columns ------------------------------------------------------------------------------ */

  const columns = data.columns.map((given) => {
    const column = { ...given, filter: null };
    column.label = given.name.startsWith("output.") ? given.name.slice(7) : given.name;
    if (given.kind === "number") {
      column.values = Float64Array.from(given.values, (one) => (one === null ? NaN : one));
      let low = Infinity, high = -Infinity, known = 0;
      for (const one of column.values) {
        if (one !== one) continue;
        known++;
        if (one < low) low = one;
        if (one > high) high = one;
      }
      const integers = known > 0 && high - low < 1e6 && column.values.every((one) => one !== one || Number.isInteger(one));
      column.bins = integers && high - low < BINS ? high - low + 1 : BINS;
      Object.assign(column, { low, high, known, integers });
      column.step = integers && high - low < BINS ? 1 : (high - low) / BINS || 1;
      column.place = (value) => Math.min(column.bins - 1, Math.floor((value - low) / column.step));
    } else if (given.kind === "category") {
      column.codes = Int16Array.from(given.codes);
    }
    column.text = (row) => {
      if (given.kind === "number") return column.values[row] !== column.values[row] ? "" : exact.format(column.values[row]);
      return (given.kind === "category" ? given.levels[column.codes[row]] : given.values[row]) ?? "";
    };
    column.cell = (row) => (given.kind === "number" && !column.integers && column.values[row] === column.values[row] ? brief(column.values[row]) : column.text(row));
    column.isNone = (row) => (given.kind === "number" ? column.values[row] !== column.values[row]
      : given.kind === "category" ? column.codes[row] < 0 : given.values[row] === null);
    return column;
  });
  const flagColumn = { name: "flags", label: "flags", kind: "flags", source: "run", filter: null, text: () => "", isNone: (row) => !bits[row] };
  const hasFlags = bits.some((one) => one);
  if (hasFlags) columns.splice(2, 0, flagColumn);
  const idColumn = columns.find((one) => one.name === "id");
  /* Ids are whole, as far as there is room: of all rows the longest counts, of other texts the first rows. */
  const ruler = document.createElement("canvas").getContext("2d");
  const measure = (text, weight = 400) => {
    ruler.font = `${weight} 13px ${getComputedStyle(document.body).fontFamily}`;
    return ruler.measureText(text).width;
  };
  const width = (column) => {
    if (column.kind === "flags") return 150;
    const named = Math.min(220, measure(column.label, 600) + 52);
    if (column.kind === "number") return Math.round(Math.max(124, named));
    const isKey = column.source === "key", most = isKey ? 360 : 300;
    let longest = "";
    for (let n = 0; n < (isKey ? count : Math.min(count, 300)); n++) {
      const text = column.text(n);
      if (text.length > longest.length) longest = text;
    }
    const wanted = measure(longest.slice(0, 200)) * 1.04 + 24;
    return Math.round(Math.max(column.kind === "category" ? 130 : 100, named, Math.min(most, wanted)));
  };
  for (const column of columns) column.width = width(column);
  const total = columns.reduce((sum, column) => sum + column.width, 0);

  /* -- state -------------------------------------------------------------------------------- */

  let order = null, shown = new Uint32Array(count), length = count;
  let sorted = null, falling = false, active = 0, opened = -1;
  let search = "", flagFilter = 0, texts = null;
  for (let n = 0; n < count; n++) shown[n] = n;

  const compare = (column) => {
    if (column.kind === "number") return (a, b) => column.values[a] - column.values[b];
    if (column.kind === "flags") return (a, b) => bits[a] - bits[b];
    if (column.kind === "category") {
      const names = column.levels.map((name, n) => [name, n]).sort((a, b) => (a[0] < b[0] ? -1 : 1));
      const ranks = new Int16Array(names.length);
      names.forEach(([, n], rank) => { ranks[n] = rank; });
      return (a, b) => ranks[column.codes[a]] - ranks[column.codes[b]];
    }
    const numeric = column.values.every((one) => one === null || /^\d{1,15}$/.test(one));
    if (numeric) return (a, b) => column.values[a] - column.values[b];
    return (a, b) => (column.values[a] < column.values[b] ? -1 : column.values[a] > column.values[b] ? 1 : 0);
  };
  const sort = (column) => {
    if (sorted === column && falling) [sorted, falling] = [null, false];
    else [sorted, falling] = sorted === column ? [column, true] : [column, false];
    order = null;
    if (sorted) {
      const known = [], none = [];
      for (let n = 0; n < count; n++) (sorted.isNone(n) ? none : known).push(n);
      const least = compare(sorted);
      known.sort(falling ? (a, b) => least(b, a) : least);
      order = Uint32Array.from(known.concat(none));
    }
    update();
  };

  const passes = (column) => {
    const { filter } = column;
    if (column.kind === "number") {
      return (row) => {
        const value = column.values[row];
        return value === value ? value >= filter.low && (filter.open ? value < filter.high : value <= filter.high) : filter.none;
      };
    }
    if (column.kind === "category") return (row) => filter.codes.has(column.codes[row]);
    const part = filter.text.toLowerCase();
    return filter.whole ? (row) => column.values[row] === filter.text
      : (row) => column.values[row] !== null && column.values[row].toLowerCase().includes(part);
  };
  const update = () => {
    const tests = columns.filter((column) => column.filter).map(passes);
    if (flagFilter) tests.push((row) => (bits[row] & flagFilter) === flagFilter);
    if (search) {
      texts ??= Array.from({ length: count }, (_, row) => columns.filter((one) => one.kind !== "number")
        .map((one) => one.text(row)).join("\n").toLowerCase());
      const wanted = search.toLowerCase();
      tests.push((row) => texts[row].includes(wanted));
    }
    const current = length ? shown[active] : -1;
    length = 0;
    for (let n = 0; n < count; n++) {
      const row = order ? order[n] : n;
      let keep = true;
      for (const test of tests) if (!test(row)) { keep = false; break; }
      if (keep) shown[length++] = row;
    }
    const kept = shown.subarray(0, length).indexOf(current);
    active = kept >= 0 && opened >= 0 ? kept : 0;
    result.value = length === count ? items : `${whole.format(length)} of ${items}`;
    clear.hidden = !tests.length;
    body.style.height = `${length * ROW}px`;
    grid.setAttribute("aria-rowcount", length + 1);
    view.scrollTop = Math.max(0, active * ROW - 4 * ROW);
    for (const column of columns) showHead(column, tests.length > 0);
    for (const chip of chips) chip.setAttribute("aria-pressed", Boolean(flagFilter & chip.bit));
    draw(true);
  };

  /* -- head: names, histograms, top values --------------------------------------------------- */

  const setFilter = (column, filter) => { column.filter = filter; update(); };
  const showHead = (column, filtered) => {
    column.head.classList.toggle("filtered", Boolean(column.filter));
    column.head.setAttribute("aria-sort", sorted !== column ? "none" : falling ? "descending" : "ascending");
    column.arrow.textContent = sorted !== column ? "" : falling ? " ↓" : " ↑";
    if (column.kind === "number" && column.parts) {
      const counts = countBins(column, filtered);
      const most = Math.max(1, ...column.all);
      column.parts.forEach((bar, n) => {
        const height = counts[n] ? Math.max(1, (36 * counts[n]) / most) : 0;
        bar.setAttribute("y", 36 - height);
        bar.setAttribute("height", height);
      });
    } else if (column.kind === "category") {
      const counts = new Uint32Array(column.levels.length);
      for (let n = 0; n < length; n++) if (column.codes[shown[n]] >= 0) counts[column.codes[shown[n]]]++;
      column.tops.forEach(({ number, bar }, n) => {
        number.textContent = whole.format(counts[n]);
        bar.style.width = `${(100 * counts[n]) / (length || 1)}%`;
      });
    }
  };
  const countBins = (column, filtered) => {
    const found = new Uint32Array(column.bins);
    if (!filtered && column.all) return column.all;
    for (let n = 0; n < length; n++) {
      const value = column.values[filtered ? shown[n] : n];
      if (value === value) found[column.place(value)]++;
    }
    if (!filtered) column.all = found;
    return found;
  };
  const makeHistogram = (column) => {
    if (column.low === column.high) {
      const all = column.known === count ? "all" : whole.format(column.known);
      return [make("p", { class: "note" }, `${all} ${exact.format(column.low)}`)];
    }
    const picture = shape("svg", { class: "spark", viewBox: `0 0 ${column.bins} 36`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const counts = countBins(column, false), most = Math.max(1, ...counts);
    column.parts = [];
    for (let n = 0; n < column.bins; n++) {
      const low = column.low + n * column.step, last = n === column.bins - 1;
      const high = last ? column.high : low + column.step;
      const height = counts[n] ? Math.max(1, (36 * counts[n]) / most) : 0;
      const at = { x: n + 0.06, width: 0.88 };
      const part = shape("rect", { ...at, y: 36, height: 0, class: "part" });
      const hit = shape("rect", { x: n, width: 1, y: 0, height: 36, class: "hit" });
      const title = shape("title", {});
      title.textContent = column.step === 1 && column.integers ? `${exact.format(low)}: ${whole.format(counts[n])}`
        : `${brief(low)} to ${brief(high)}: ${whole.format(counts[n])}`;
      hit.append(title);
      hit.addEventListener("click", () => {
        const same = column.filter && column.filter.low === low && column.filter.high === high;
        setFilter(column, same ? null : { low, high, open: !last, none: false });
      });
      picture.append(shape("rect", { ...at, y: 36 - height, height }), part, hit);
      column.parts.push(part);
    }
    const range = make("div", { class: "range" }, make("span", {}, brief(column.low)), make("span", {}, brief(column.high)));
    return [picture, range];
  };
  const makeTops = (column) => {
    const list = make("ul", { class: "levels" });
    column.tops = [];
    if (column.kind === "category") {
      column.levels.slice(0, 3).forEach((name, code) => {
        const number = make("small"), bar = make("i");
        const pick = make("button", { type: "button", tabindex: -1, title: name || "(blank)", onclick: () => {
          const same = column.filter && column.filter.codes.size === 1 && column.filter.codes.has(code);
          setFilter(column, same ? null : { codes: new Set([code]) });
        } }, bar, make("span", {}, name || "(blank)"), number);
        column.tops.push({ number, bar });
        list.append(make("li", {}, pick));
      });
      if (column.levels.length > 3) list.append(make("li", {}, make("p", {}, `${whole.format(column.levels.length - 3)} more`)));
      return list;
    }
    if (!column.distinct) return make("p", { class: "note" }, "no values");
    list.append(make("li", {}, make("p", {}, column.distinct === count ? "all different" : `${whole.format(column.distinct)} different`)));
    for (const [name, number] of column.top.slice(0, 2)) {
      list.append(make("li", {}, make("button", { type: "button", tabindex: -1, title: name, onclick: () => {
        const same = column.filter && column.filter.whole && column.filter.text === name;
        setFilter(column, same ? null : { text: name, whole: true });
      } }, make("span", {}, name || "(blank)"), make("small", {}, whole.format(number)))));
    }
    return list;
  };
  const makeFlagTops = () => {
    const list = make("ul", { class: "levels" });
    data.flags.forEach((name, n) => {
      const number = bits.reduce((sum, one) => sum + ((one >> n) & 1), 0);
      if (number && list.childElementCount < 3) list.append(make("li", {}, make("button", { type: "button", tabindex: -1, onclick: () => { flagFilter ^= 1 << n; update(); } },
        make("span", {}, name), make("small", {}, whole.format(number)))));
    });
    return list;
  };
  const makeHead = (column, place) => {
    column.arrow = make("i");
    const source = { answer: "field of the answer", input: "column of the input", key: "", run: "recorded by the run" }[column.source];
    const name = make("button", { type: "button", class: "sort", title: `${column.name}${source ? `: ${source}` : ""}. Click to sort.`, onclick: () => sort(column) }, column.label, column.arrow);
    const menu = column.kind === "flags" ? null : make("button", {
      type: "button", class: "menu", "aria-haspopup": "dialog", "aria-expanded": "false", "aria-label": `Filter ${column.label}`, title: "Filter", onclick: (event) => openPopup(column, event.currentTarget),
    }, "▾");
    const parts = column.kind === "flags" ? [makeFlagTops()] : column.kind !== "number" ? [makeTops(column)]
      : column.known ? makeHistogram(column) : [make("p", { class: "note" }, "no values")];
    column.head = make("div", { class: "column", role: "columnheader", "aria-colindex": place + 1 }, make("div", { class: "name" }, name, menu), ...parts);
    column.head.style.width = `${column.width}px`;
    return column.head;
  };

  /* -- filter of a column -------------------------------------------------------------------- */

  let popup = null;
  const closePopup = (focus = true) => {
    if (!popup) return;
    popup.box.remove();
    popup.button.setAttribute("aria-expanded", "false");
    if (focus) popup.button.focus();
    popup = null;
  };
  const openPopup = (column, button) => {
    const same = popup && popup.button === button;
    closePopup();
    if (same) return;
    const box = make("div", { class: "popup", role: "dialog", "aria-label": `Filter ${column.label}` });
    const apply = (filter) => { closePopup(); setFilter(column, filter); };
    const buttons = make("div", { class: "buttons" });
    if (column.kind === "number") {
      const low = make("input", { type: "number", step: "any", placeholder: column.known ? exact.format(column.low) : "", "aria-label": "at least" });
      const high = make("input", { type: "number", step: "any", placeholder: column.known ? exact.format(column.high) : "", "aria-label": "at most" });
      const none = make("input", { type: "checkbox" });
      if (column.filter) {
        if (Number.isFinite(column.filter.low)) low.value = column.filter.low;
        if (Number.isFinite(column.filter.high)) high.value = column.filter.high;
        none.checked = column.filter.none;
      }
      box.append(make("div", { class: "pair" }, make("label", {}, low), make("label", {}, high)), make("label", {}, none, make("span", {}, "also items without a value")));
      buttons.append(make("button", { type: "button", class: "chip", onclick: () => apply({
        low: low.value === "" ? -Infinity : Number(low.value), high: high.value === "" ? Infinity : Number(high.value), none: none.checked,
      }) }, "Apply"));
    } else if (column.kind === "category") {
      const counts = new Map();
      for (const code of column.codes) counts.set(code, (counts.get(code) || 0) + 1);
      const picked = new Map();
      const add = (code, name) => {
        const tick = make("input", { type: "checkbox" });
        tick.checked = column.filter ? column.filter.codes.has(code) : false;
        picked.set(code, tick);
        box.append(make("label", { title: name }, tick, make("span", {}, name), make("small", {}, whole.format(counts.get(code) || 0))));
      };
      column.levels.forEach((name, code) => add(code, name || "(blank)"));
      if (counts.has(-1)) add(-1, "(no value)");
      buttons.append(make("button", { type: "button", class: "chip", onclick: () => {
        const codes = new Set([...picked].filter(([, tick]) => tick.checked).map(([code]) => code));
        apply(codes.size ? { codes } : null);
      } }, "Apply"));
    } else {
      const field = make("input", { type: "text", class: "text", placeholder: "contains …", "aria-label": "contains" });
      if (column.filter) field.value = column.filter.text;
      box.append(field);
      for (const [name, number] of column.top) {
        box.append(make("label", { title: name }, make("button", { type: "button", class: "chip", onclick: () => apply({ text: name, whole: true }) }, name || "(blank)"), make("small", {}, whole.format(number))));
      }
      buttons.append(make("button", { type: "button", class: "chip", onclick: () => apply(field.value ? { text: field.value, whole: false } : null) }, "Apply"));
    }
    buttons.append(make("button", { type: "button", class: "chip", onclick: () => apply(null) }, "Clear"));
    box.append(buttons);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") closePopup();
      if (event.key === "Enter" && event.target.tagName === "INPUT") { event.preventDefault(); buttons.firstChild.click(); }
      event.stopPropagation();
    });
    const at = button.getBoundingClientRect();
    box.style.top = `${at.bottom + scrollY + 6}px`;
    box.style.left = `${Math.max(8, Math.min(at.right - 270, document.documentElement.clientWidth - 290)) + scrollX}px`;
    document.body.append(box);
    button.setAttribute("aria-expanded", "true");
    popup = { box, button };
    box.querySelector("input, button").focus();
  };
  document.addEventListener("pointerdown", (event) => {
    if (popup && !popup.box.contains(event.target) && event.target !== popup.button) closePopup(false);
  });

  /* -- rows: only those in view exist --------------------------------------------------------- */

  const rows = new Map();
  const makeRow = (place) => {
    const row = shown[place];
    const line = make("div", { class: `row${place % 2 ? " odd" : ""}`, role: "row", id: `row-${place}`, "aria-rowindex": place + 2 });
    line.style.top = `${place * ROW}px`;
    line.style.width = `${total}px`;
    columns.forEach((column, n) => {
      const cell = make("div", { class: "cell", role: "gridcell", "aria-colindex": n + 1 });
      cell.style.width = `${column.width}px`;
      if (column.kind === "number") cell.classList.add("number");
      if (column.kind === "flags") data.flags.forEach((name, bit) => { if ((bits[row] >> bit) & 1) cell.append(make("span", { class: "tag" }, name)); });
      else if (column.isNone(row)) { cell.classList.add("none"); cell.textContent = "–"; }
      else {
        const text = column.cell(row);
        cell.textContent = text.length > 200 ? text.slice(0, 200) : text;
        if (column.name === "status" && text === "failed") cell.classList.add("failed");
      }
      line.append(cell);
    });
    line.addEventListener("click", () => { move(place); openItem(); });
    return line;
  };
  const draw = (fresh) => {
    if (fresh) { for (const line of rows.values()) line.remove(); rows.clear(); }
    const first = Math.max(0, Math.floor(view.scrollTop / ROW) - MARGIN);
    const last = Math.min(length, Math.ceil((view.scrollTop + view.clientHeight) / ROW) + MARGIN);
    for (const [place, line] of rows) if (place < first || place >= last) { line.remove(); rows.delete(place); }
    for (let place = first; place < last; place++) {
      if (!rows.has(place)) { const line = makeRow(place); rows.set(place, line); body.append(line); }
    }
    for (const [place, line] of rows) {
      line.classList.toggle("active", place === active);
      line.setAttribute("aria-selected", place === active);
    }
    if (rows.has(active)) view.setAttribute("aria-activedescendant", `row-${active}`);
    else view.removeAttribute("aria-activedescendant");
  };
  const move = (place) => {
    active = Math.max(0, Math.min(length - 1, place));
    const top = active * ROW, room = view.clientHeight - head.offsetHeight;
    if (top < view.scrollTop) view.scrollTop = top;
    if (top + ROW > view.scrollTop + room) view.scrollTop = top + ROW - room;
    draw(false);
    if (opened >= 0 && length) openItem();
  };

  /* -- item pane ------------------------------------------------------------------------------ */

  const blocks = new Map();
  const details = async (row) => {
    const number = Math.floor(row / data.block);
    if (!blocks.has(number)) {
      if (blocks.size >= 4) blocks.delete(blocks.keys().next().value);
      blocks.set(number, unpack(`details-${number}`));
    }
    return (await blocks.get(number))[row % data.block];
  };
  const message = (role, text, note) => make("figure", { class: "message" }, make("figcaption", {}, note ? `${role} (${note})` : role), make("pre", {}, text));
  const list = (names, lines) => make("table", {}, make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...lines.map((line) => make("tr", {}, ...line.map((cell) => make("td", {}, cell))))));
  const openItem = async () => {
    if (!length) return;
    const row = shown[active];
    opened = row;
    const found = await details(row);
    if (opened !== row) return;
    const parts = [make("header", {}, make("h3", {}, make("bdi", {}, idColumn ? idColumn.text(row) : `row ${row + 1}`)),
      make("button", { type: "button", class: "chip", "aria-label": "Previous item", onclick: () => move(active - 1) }, "↑"),
      make("button", { type: "button", class: "chip", "aria-label": "Next item", onclick: () => move(active + 1) }, "↓"),
      make("button", { type: "button", class: "chip", "aria-label": "Close", onclick: closeItem }, "✕"))];
    const section = (title, ...content) => parts.push(make("section", { class: "part" }, make("h4", {}, title), ...content));
    data.flags.forEach((name, bit) => { if ((bits[row] >> bit) & 1) parts.push(make("span", { class: "tag", title: meta.flags[name] }, name)); });
    if (found.error) section("Error", make("p", { class: "error" }, found.error));
    if (found.output !== undefined) section("Answer", make("pre", {}, typeof found.output === "string" ? found.output : JSON.stringify(found.output, null, 1).replace(/\\\\(x[0-9a-f]{2}|u[0-9a-f]{4})/g, "\\$1")));
    if (found.raw) section("Text of the model", make("pre", {}, found.raw));
    if (found.reasoning) section("Reasoning", make("pre", {}, found.reasoning));
    if (found.prompt) section("Prompt", ...meta.constants.map(([role, text]) => message(role, text, "the same for all items")), ...found.prompt.map(([role, text]) => message(role, text)));
    if (found.attempts) {
      const start = found.attempts[0][1];
      section("Requests", list(["endpoint", "after s", "took s", "outcome"], found.attempts.map(([endpoint, began, took, outcome]) =>
        [endpoint, typeof began === "number" ? brief(began - start) : "–", typeof took === "number" ? brief(took) : "–", outcome])));
    }
    if (found.usage) section("Endpoints", list(["endpoint", "requests", "tokens in", "tokens out"], found.usage.map((line) => line.map((one) => (one == null ? "–" : String(one))))));
    const facts = make("dl", { class: "facts" });
    for (const column of columns) {
      if (column.kind !== "flags" && column.source !== "answer" && !column.isNone(row)) facts.append(make("dt", {}, column.label), make("dd", {}, make("bdi", {}, column.text(row))));
    }
    section("Columns", facts);
    pane.replaceChildren(...parts);
    pane.hidden = false;
    pane.scrollTop = 0;
    frame.classList.add("open");
  };
  const closeItem = () => {
    opened = -1;
    pane.hidden = true;
    frame.classList.remove("open");
    view.focus();
    draw(false);
  };

  /* -- parts of the page ---------------------------------------------------------------------- */

  const field = make("input", { type: "search", placeholder: "Search all texts  ( / )", "aria-label": "Search all texts" });
  const result = make("output", { "aria-live": "polite" });
  const clear = make("button", { type: "button", class: "chip", onclick: () => {
    for (const column of columns) column.filter = null;
    [flagFilter, search, field.value] = [0, "", ""];
    update();
  } }, "Clear filters");
  const chips = data.flags.flatMap((name, n) => {
    const number = bits.reduce((sum, one) => sum + ((one >> n) & 1), 0);
    if (!number) return [];
    const chip = make("button", { type: "button", class: "chip", title: meta.flags[name], "aria-pressed": "false", onclick: () => { flagFilter ^= 1 << n; update(); } }, name, make("small", {}, whole.format(number)));
    chip.bit = 1 << n;
    return [chip];
  });
  const body = make("div", { class: "body", role: "rowgroup" });
  const head = make("div", { class: "head", role: "row", "aria-rowindex": 1 }, ...columns.map(makeHead));
  head.style.width = body.style.width = `${total}px`;
  const grid = make("div", { role: "grid", "aria-label": "Items", "aria-colcount": columns.length }, make("div", { class: "heads", role: "rowgroup" }, head), body);
  const view = make("div", { class: "view", tabindex: 0, "aria-label": "Items; arrow keys move, Enter opens an item" }, grid);
  const pane = make("aside", { class: "pane", tabindex: -1, "aria-label": "Item", hidden: true });
  const frame = make("div", { class: "frame" }, view, pane);
  frame.style.height = `min(78vh, 760px, ${Math.max(340, 124 + ROW * data.rows)}px)`;
  host.replaceChildren(make("div", { class: "tools" }, field, ...chips, clear, result), frame);

  let waiting = 0, drawing = false;
  field.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { search = field.value.trim(); update(); }, 150); });
  view.addEventListener("scroll", () => {
    if (popup) closePopup(false);
    if (!drawing) { drawing = true; requestAnimationFrame(() => { drawing = false; draw(false); }); }
  });
  view.addEventListener("keydown", (event) => {
    if (event.target !== view) return;
    const page = Math.max(1, Math.floor((view.clientHeight - head.offsetHeight) / ROW) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -count, End: count };
    if (event.key in steps) move(active + steps[event.key]);
    else if (event.key === "Enter") openItem();
    else if (event.key === "Escape" && opened >= 0) closeItem();
    else return;
    event.preventDefault();
  });
  pane.addEventListener("keydown", (event) => { if (event.key === "Escape") closeItem(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) { event.preventDefault(); field.focus(); }
  });
  new ResizeObserver(() => draw(false)).observe(view);
  update();
  host.dataset.ready = Math.round(performance.now());
})();
