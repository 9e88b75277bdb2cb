"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const COLOURS = ["#ffb454", "#6cb6ff", "#7ee787", "#ff7b9c", "#d2a8ff", "#56d4dd", "#f2cc60", "#ff9b72", "#a5d6a7", "#b0bec5"];
  const MOST_PANELS = 4;
  const main = data.clips[0];
  const state = {
    frame: 0, step: main.steps.length, playing: null, view: data.frames.length ? "overlay" : "map",
    opacity: data.start.opacity, normalize: data.start.normalize, over: main.ranges.real ? data.start.over : "all",
    colormap: data.start.colormap, panels: [],
  };

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const tables = Object.fromEntries(Object.entries(data.tables).map(([name, text]) => [name, bytes(text)]));
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const format = (value) => (value === 0 ? "0" : Math.abs(value) >= 0.001 ? value.toPrecision(3) : value.toExponential(1));
  const colourOf = (clip, group) => COLOURS[(group + (clip ? 4 : 0)) % COLOURS.length];

  // Pictures are decoded on demand and a few hundred kept.
  const decoded = new Map();
  const remember = (key, make) => {
    if (!decoded.has(key)) {
      if (decoded.size > 300) decoded.delete(decoded.keys().next().value);
      decoded.set(key, make());
    }
    return decoded.get(key);
  };
  const picture = async (source) => {
    const image = new Image();
    image.src = source;
    await image.decode();
    return image;
  };
  const frameImage = (index) => remember("frame" + index, () => picture("data:image/jpeg;base64," + data.frames[index]));
  const atlas = (key, entry) => remember(key, async () => {
    const image = await picture("data:image/png;base64," + entry.png);
    const sheet = element("canvas", { width: image.naturalWidth, height: image.naturalHeight });
    const context = sheet.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return { pixels: context.getImageData(0, 0, sheet.width, sheet.height).data, width: sheet.width };
  });

  // Video frame f belongs to latent frame (f + 3) / 4 rounded down: frame 0 alone, then four each.
  const videoFrame = () => Math.min(state.frame * data.video.stride, data.video.count - 1);
  const latentFrame = (clip) => {
    const f = data.video.count === data.video.mapped ? videoFrame()
      : Math.round(videoFrame() * (data.video.mapped - 1) / Math.max(1, data.video.count - 1));
    return Math.min(Math.floor((f + 3) / 4), clip.grid[0] - 1);
  };

  async function weights(clipIndex, group) {
    const clip = data.clips[clipIndex];
    const step = Math.min(state.step, clip.steps.length);
    const [, height, width] = clip.grid;
    const frame = latentFrame(clip);
    const top = Math.floor(frame / clip.columns) * height;
    const left = (frame % clip.columns) * width;
    const read = async (key, entry) => {
      const sheet = await atlas(key, entry);
      const values = new Float32Array(height * width);
      const slope = (entry.high - entry.low) / 255;
      for (let y = 0; y < height; y++)
        for (let x = 0; x < width; x++)
          values[y * width + x] = entry.low + slope * sheet.pixels[4 * ((top + y) * sheet.width + left + x)];
      return values;
    };
    const values = await read(`${clipIndex}/${group}/${step}`, clip.maps[group][step]);
    if (state.over === "real" && clip.real.length) {
      const real = await read(`${clipIndex}/real/${step}`, clip.real[step]);
      for (let i = 0; i < values.length; i++) values[i] = Math.min(1, values[i] / Math.max(real[i], 1e-9));
    }
    return values;
  }

  function ownRange(values) {
    const sorted = Float32Array.from(values).sort();
    const at = (percent) => sorted[Math.round((percent / 100) * (sorted.length - 1))];
    const least = sorted[0], most = sorted[sorted.length - 1];
    let low = at(100 - data.start.percentile), high = Math.max(at(data.start.percentile), most / 4);
    if (high - low < 1e-6 * Math.max(most, 1e-9)) [low, high] = [least, most];
    if (high - low < 1e-6 * Math.max(most, 1e-9)) [low, high] = [0, Math.max(most, 1e-9)];
    return [low, high];
  }

  function rangeOf(clip, group, values) {
    if (state.normalize === "none") return [0, 1];
    if (state.normalize === "frame" || clip.groups[group].special || !clip.ranges[state.over]) return ownRange(values);
    const ranges = clip.ranges[state.over][state.step >= clip.steps.length ? "mean" : "steps"];
    return state.normalize === "global" ? ranges.global : ranges.word[clip.groups[group].name];
  }

  function makePanel(clipIndex, group) {
    const clip = data.clips[clipIndex];
    const name = element("strong", { textContent: clip.groups[group].name });
    name.style.color = colourOf(clipIndex, group);
    const note = element("span", { className: "dim" });
    const canvas = element("canvas", { width: data.video.width, height: data.video.height });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `attention of ${clip.groups[group].name}`);
    const bar = element("canvas", { width: 256, height: 1 });
    const low = element("span"), high = element("span");
    const label = element("span", {}, name, clipIndex ? " (negative prompt)" : "");
    const root = element("figure", { className: "panel" }, element("figcaption", {}, label, note), canvas, element("div", { className: "scale" }, low, bar, high));
    return { clipIndex, group, root, canvas, note, bar, low, high };
  }

  async function drawPanel(panel, background) {
    const clip = data.clips[panel.clipIndex];
    const values = await weights(panel.clipIndex, panel.group);
    const [low, high] = rangeOf(clip, panel.group, values);
    const [, height, width] = clip.grid;
    const table = tables[state.colormap];
    const alone = state.view === "map" || !background;
    const small = element("canvas", { width, height });
    const pixels = new ImageData(width, height);
    let sum = 0;
    for (let i = 0; i < values.length; i++) {
      const share = Math.min(1, Math.max(0, (values[i] - low) / (high - low)));
      const index = Math.round(share * 255) * 3;
      pixels.data.set([table[index], table[index + 1], table[index + 2], alone ? 255 : Math.round(255 * share * state.opacity)], 4 * i);
      sum += values[i];
    }
    small.getContext("2d").putImageData(pixels, 0, 0);
    const context = panel.canvas.getContext("2d");
    if (!alone) context.drawImage(background, 0, 0, panel.canvas.width, panel.canvas.height);
    context.imageSmoothingEnabled = !alone;
    context.drawImage(small, 0, 0, panel.canvas.width, panel.canvas.height);
    panel.note.textContent = `latent frame ${latentFrame(clip)}, mean ${format(sum / values.length)}`;
    panel.low.textContent = format(low);
    panel.high.textContent = format(high);
    const strip = new ImageData(256, 1);
    for (let i = 0; i < 256; i++) strip.data.set([table[3 * i], table[3 * i + 1], table[3 * i + 2], 255], 4 * i);
    panel.bar.getContext("2d").putImageData(strip, 0, 0);
  }

  // One drawing at a time; what changed meanwhile is drawn next.
  let drawing = false, again = false, drawn = 0;
  async function draw() {
    if (drawing) { again = true; return; }
    drawing = true;
    do {
      again = false;
      const background = data.frames.length ? await frameImage(state.frame) : null;
      for (const panel of [...state.panels]) await drawPanel(panel, background);
    } while (again);
    drawing = false;
    document.body.dataset.drawn = String(++drawn);
  }

  function outputs() {
    const last = state.step >= main.steps.length;
    const t = last ? null : main.timesteps[state.step];
    byId("frame-out").textContent = `${videoFrame()} of ${data.video.count - 1} (${(videoFrame() / data.video.fps).toFixed(2)} s)`;
    byId("step-out").textContent = last ? `mean of ${main.all_steps.length} steps` : `${main.steps[state.step]} of ${main.all_steps.at(-1)}` + (t === null ? "" : ` (t = ${Math.round(t)})`);
    byId("opacity-out").textContent = state.opacity.toFixed(2);
    byId("frame").value = state.frame;
    byId("step").value = Math.min(state.step, main.steps.length - 1);
    byId("opacity").value = state.opacity;
    byId("mean").setAttribute("aria-pressed", String(last));
    for (const name of ["view", "normalize", "over", "colormap"]) byId(name).value = state[name];
    markCharts();
  }

  function refresh() { outputs(); return draw(); }

  function layout() {
    byId("panels").replaceChildren(...state.panels.map((panel) => panel.root));
    byId("panels").style.setProperty("--columns", Math.min(2, state.panels.length));
    for (const chip of document.querySelectorAll(".chip")) {
      const shown = state.panels.some((panel) => `${panel.clipIndex}/${panel.group}` === chip.dataset.key);
      chip.setAttribute("aria-pressed", String(shown));
    }
    for (const line of document.querySelectorAll("[data-group]"))
      line.style.opacity = state.panels.some((panel) => panel.clipIndex === 0 && String(panel.group) === line.dataset.group) ? 1 : 0.35;
  }

  function toggle(clipIndex, group) {
    const found = state.panels.findIndex((panel) => panel.clipIndex === clipIndex && panel.group === group);
    if (found >= 0 && state.panels.length > 1) state.panels.splice(found, 1);
    else if (found < 0) {
      state.panels.push(makePanel(clipIndex, group));
      if (state.panels.length > MOST_PANELS) state.panels.shift();
    }
    layout();
    return refresh();
  }

  function buildChips() {
    data.clips.forEach((clip, clipIndex) => {
      const row = element("div", { className: "chip-row" });
      if (data.clips.length > 1) row.append(element("span", { textContent: clip.label }));
      clip.groups.forEach((group, index) => {
        const chip = element("button", { type: "button", className: "chip" + (group.special ? " special" : ""), textContent: group.name });
        chip.dataset.key = `${clipIndex}/${index}`;
        chip.style.setProperty("--chip", colourOf(clipIndex, index));
        chip.addEventListener("click", () => toggle(clipIndex, index));
        row.append(chip);
      });
      byId("chips").append(row);
    });
  }

  // Curves: plain SVG.
  const svg = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const WIDTH = 560, HEIGHT = 190, LEFT = 56, RIGHT = 12, TOP = 10, BOTTOM = 26;
  const stepX = (row, count) => LEFT + (count > 1 ? row / (count - 1) : 0.5) * (WIDTH - LEFT - RIGHT);
  const marks = [];

  function chart(id, series) {
    const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    const count = main.all_steps.length;
    const every = series.flatMap((one) => one.values);
    let least = Math.min(...every, Infinity), most = Math.max(...every, -Infinity);
    if (!every.length) [least, most] = [0, 1];
    if (most - least < 1e-12) [least, most] = [least - 0.5 * Math.abs(least) - 1e-6, most + 0.5 * Math.abs(most) + 1e-6];
    const y = (value) => TOP + (1 - (value - least) / (most - least)) * (HEIGHT - TOP - BOTTOM);
    for (let tick = 0; tick <= 3; tick++) {
      const value = least + (tick / 3) * (most - least);
      root.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), stroke: "#2d2d36" }));
      root.append(svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, Math.abs(value) >= 0.001 ? value.toPrecision(4) : format(value)));
    }
    for (const row of new Set([0, Math.floor((count - 1) / 2), count - 1]))
      root.append(svg("text", { x: stepX(row, count), y: HEIGHT - 8, "text-anchor": row && row === count - 1 ? "end" : "middle" }, `step ${main.all_steps[row]}`));
    for (const one of series) {
      const points = one.values.map((value, row) => `${stepX(row, count).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      const line = svg("polyline", { points, fill: "none", stroke: one.colour, "stroke-width": 2, "stroke-linejoin": "round" });
      if (one.group !== undefined) line.dataset.group = one.group;
      line.append(svg("title", {}, one.name));
      root.append(line);
      if (count === 1) root.append(svg("circle", { cx: stepX(0, 1), cy: y(one.values[0]), r: 3, fill: one.colour }));
    }
    const mark = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "#f0f0f2", "stroke-dasharray": "3 3", visibility: "hidden" });
    root.append(mark);
    marks.push(mark);
    root.addEventListener("click", (event) => {
      const box = root.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      const distances = main.steps.map((step) => Math.abs(stepX(main.all_steps.indexOf(step), count) - x));
      state.step = distances.indexOf(Math.min(...distances));
      refresh();
    });
    byId(id).append(root);
  }

  function markCharts() {
    const hidden = state.step >= main.steps.length;
    for (const mark of marks) {
      mark.setAttribute("visibility", hidden ? "hidden" : "visible");
      if (hidden) continue;
      const x = stepX(main.all_steps.indexOf(main.steps[state.step]), main.all_steps.length);
      mark.setAttribute("x1", x);
      mark.setAttribute("x2", x);
    }
  }

  function importance() {
    const words = main.groups.map((group, index) => ({ group, index })).filter((entry) => !entry.group.special);
    const bars = words.map(({ group, index }) => ({ group, index, mean: main.mass.reduce((sum, row) => sum + row[index], 0) / main.mass.length }))
      .sort((a, b) => b.mean - a.mean).slice(0, 16);
    const height = Math.max(HEIGHT, bars.length * 22 + 8);
    const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img" });
    const most = Math.max(...bars.map((bar) => bar.mean), 1e-12);
    bars.forEach((bar, row) => {
      const length = (bar.mean / most) * (WIDTH - 230);
      const label = bar.group.name.length > 18 ? bar.group.name.slice(0, 17) + "…" : bar.group.name;
      root.append(svg("text", { x: 130, y: row * 22 + 19, "text-anchor": "end", class: "name" }, label));
      const shape = svg("rect", { x: 138, y: row * 22 + 8, width: Math.max(1, length), height: 14, rx: 2, fill: colourOf(0, bar.index) });
      shape.dataset.group = bar.index;
      root.append(shape, svg("text", { x: 144 + length, y: row * 22 + 19 }, format(bar.mean)));
    });
    byId("chart-importance").append(root);
  }

  function curves() {
    const words = main.groups.map((group, index) => ({ ...group, index })).filter((group) => !group.special);
    const series = (rows) => words.map((word) => ({ name: word.name, group: word.index, colour: colourOf(0, word.index), values: rows.map((row) => row[word.index]) }));
    chart("chart-mass", series(main.mass));
    chart("chart-spread", series(main.spread));
    chart("chart-entropy", [{ name: "entropy", colour: "#f0f0f2", values: main.entropy }]);
    importance();
  }

  function play() {
    if (state.playing) { clearInterval(state.playing); state.playing = null; }
    else state.playing = setInterval(() => { state.frame = (state.frame + 1) % frameCount; refresh(); }, 1000 * data.video.stride / data.video.fps);
    byId("play").textContent = state.playing ? "⏸" : "▶";
  }

  const frameCount = data.frames.length || data.video.count;
  byId("frame").max = frameCount - 1;
  byId("step").max = Math.max(0, main.steps.length - 1);
  for (const name of Object.keys(data.tables)) byId("colormap").append(element("option", { value: name, textContent: name }));
  if (!data.frames.length) byId("view").disabled = true;
  if (!main.ranges.real) byId("over").disabled = true;
  byId("frame").addEventListener("input", (event) => { state.frame = Number(event.target.value); refresh(); });
  byId("step").addEventListener("input", (event) => { state.step = Number(event.target.value); refresh(); });
  byId("opacity").addEventListener("input", (event) => { state.opacity = Number(event.target.value); refresh(); });
  byId("mean").addEventListener("click", () => { state.step = state.step >= main.steps.length ? main.steps.length - 1 : main.steps.length; refresh(); });
  byId("play").addEventListener("click", play);
  for (const name of ["view", "normalize", "over", "colormap"])
    byId(name).addEventListener("change", (event) => { state[name] = event.target.value; refresh(); });
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT", "BUTTON"].includes(event.target.tagName)) return;
    const limit = (value, most) => Math.min(most, Math.max(0, value));
    const moves = {
      " ": play,
      ArrowRight: () => { state.frame = limit(state.frame + 1, frameCount - 1); },
      ArrowLeft: () => { state.frame = limit(state.frame - 1, frameCount - 1); },
      ArrowUp: () => { state.step = limit(state.step + 1, main.steps.length); },
      ArrowDown: () => { state.step = limit(state.step - 1, main.steps.length); },
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
    refresh();
  });
  buildChips();
  curves();
  // Start with the word of the largest mean weight.
  const words = main.groups.flatMap((group, index) => (group.special ? [] : [index]));
  const total = (index) => main.mass.reduce((sum, row) => sum + row[index], 0);
  toggle(0, words.length ? words.reduce((best, index) => (total(index) > total(best) ? index : best)) : 0);
})();
