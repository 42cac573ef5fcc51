
"use strict";

// All texts of models and users are set as text, never as HTML.
const run = JSON.parse(document.getElementById("content").textContent);

// ---------------------------------------------------------------------- small things
function byId(id) {
  return document.getElementById(id);
}

// Return a new element; children are elements, or texts.
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// Return a number as it is read: with its sign where that matters, and a true minus.
function signed(number, digits = 2) {
  if (number === null || number === undefined) return "–";
  const text = Math.abs(number).toFixed(digits);
  if (Number(text) === 0) return text;
  return (number < 0 ? "−" : "+") + text;
}

function plain(number, digits = 2) {
  return signed(number, digits).replace("+", "");
}

// Return a number with the four digits that are known of it, in two to five places.
function exact(number) {
  if (!number) return signed(number);
  const places = 3 - Math.floor(Math.log10(Math.abs(number)));
  return signed(number, Math.min(Math.max(places, 2), 5)).replace(/(\.\d\d\d*?)0+$/, "$1");
}

function percent(share, digits = 1) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)} %`;
}

function whole(number) {
  return number.toLocaleString("en-US");
}

// ------------------------------------------------------------------------- the header
const TITLES = {
  train_rlhf: "fine-tuned with PPO",
  train_sft: "taught by examples",
  train_reward_model: "a reward model",
};

const LEARNED_FROM = {
  train_rlhf: "samples",
  train_sft: "examples",
  train_reward_model: "comparisons",
};

function showHeader() {
  for (const element of document.querySelectorAll(".only")) {
    if (!element.classList.contains(run.script)) element.remove();
  }
  const name = run.model.split("/").filter(Boolean).pop();
  byId("title").textContent = `${name}, ${TITLES[run.script]}`;
  document.title = byId("title").textContent;

  const facts = [];
  if (run.reward) facts.push(`reward ${run.reward}`);
  if (run.data) facts.push(`data ${run.data}`);
  facts.push(`${whole(run.samples)} ${LEARNED_FROM[run.script]}`);
  facts.push(`${whole(run.step)} steps`);
  facts.push(`${run.seconds.toFixed(0)} seconds${run.device ? ` on ${run.device}` : ""}`);
  facts.push(`seed ${run.seed}`);
  byId("facts").textContent = facts.join(" · ");

  if (!run.results) {
    const done = `${whole(run.step)} of ${whole(run.total_steps)} steps are done`;
    byId("status").textContent =
      `The run still goes on, or was stopped: ${done}. ` +
      "What comes of it is not known yet.";
    byId("status").hidden = false;
  }
}

// ------------------------------------------------------------------------- the result
function showResult() {
  if (run.kl_coef !== null && byId("kl-coef")) byId("kl-coef").textContent = String(run.kl_coef);
  if (run.accuracy !== null) {
    byId("proxy").textContent =
      "The score is a proxy: it is the opinion of a reward model, " +
      `${run.reward}, which agrees with ${percent(run.accuracy, 0)} of held-out comparisons. ` +
      "A higher score is what that model likes, not always what people do.";
    byId("proxy").hidden = false;
  }
  if (!run.results) {
    byId("headline").remove();
    return;
  }
  const { base, trained } = run.results;
  if (run.script === "train_rlhf") showPolicyResult(base.train_prompts, trained.train_prompts);
  if (run.script === "train_sft") {
    showHeadline(plain(base.loss), plain(trained.loss), "nats a token: the held-out loss");
    const count = `${whole(trained.tokens)} tokens of ${whole(trained.examples)} held-out answers`;
    byId("verdict").textContent = `Over ${count}. ${learnedOrNot()}`;
  }
  if (run.script === "train_reward_model") {
    const unit = "of held-out comparisons are judged as people did";
    showHeadline(percent(base.accuracy, 0), percent(trained.accuracy, 0), unit);
    const chance = `guessing is right in ${percent(trained.guessing, 0)}`;
    const count = `${whole(trained.comparisons)} comparisons`;
    byId("verdict").textContent =
      `± ${percent(trained.standard_error)} over ${count}, where ${chance}. ${learnedOrNot()}`;
  }
}

function showPolicyResult(before, after) {
  const scores = `${signed(before.score)} → ${signed(after.score)}`;
  const cost = `at ${plain(after.kl, 1)} nats of KL from the base model`;
  if (before.success_rate === null) {
    showHeadline(signed(before.score), signed(after.score), "mean score, before and after");
    byId("verdict").textContent = `${cost[0].toUpperCase()}${cost.slice(1)}. ${learnedOrNot()}`;
    return;
  }
  const unit = run.is_rule
    ? "of responses have one of the positive words"
    : `of responses score above ${plain(run.threshold)}`;
  showHeadline(percent(before.success_rate, 0), percent(after.success_rate, 0), unit);
  byId("verdict").textContent = `Mean score ${scores}, ${cost}. ${learnedOrNot()}`;
}

function showHeadline(before, after, unit) {
  byId("headline").append(
    make("span", { class: "before" }, before),
    " → ",
    after,
    make("span", { class: "unit" }, unit),
  );
}

function learnedOrNot() {
  return run.learned ? "" : "Beyond chance it did not learn.";
}

// -------------------------------------------------------------------------- the curve
// A panel is a picture with its own vertical axis; a series is a line, dots or both.
const LEFT = 44;
const RIGHT = 12;
const PANEL_TOP = 26;

function panelsOfRun() {
  const curve = run.curve;
  const xs = curve.step;
  if (run.script === "train_rlhf") {
    // On the scale that is trained on, the score is what the reward is with the price put back.
    const scaled = (rewards, kls) =>
      rewards.map((reward, i) => (reward === null ? null : reward + run.kl_coef * kls[i]));
    const score = {
      name: isScaled() ? "score, as trained on" : "score",
      look: "more",
      xs,
      ys: scaled(curve.mean_reward, curve.mean_kl),
      dots: scaled(curve.reward, curve.kl),
    };
    const reward = { name: "score − price of KL", look: "less dash", xs, ys: curve.mean_reward };
    const kl = { name: "KL in nats", look: "ink", xs, ys: curve.mean_kl, dots: curve.kl };
    return [
      { height: 190, series: [score, reward], gap: true },
      { height: 110, series: [kl], least: 0 },
    ];
  }
  const loss = { name: "loss in training", look: "less", xs, ys: curve.mean_loss };
  const panels = [{ height: 190, series: [loss, heldOut("loss", "held-out loss")] }];
  if (run.script === "train_reward_model") {
    panels.push({ height: 140, series: [heldOut("accuracy", "held-out accuracy")] });
  }
  return panels;
}

// Return whether the scores were put on another scale before they were trained on.
function isScaled() {
  const { score, reward, kl } = run.curve;
  return reward.some((left, i) => {
    return left !== null && Math.abs(left + run.kl_coef * kl[i] - score[i]) > 0.01;
  });
}

// Return what was measured on held-out rows: before, at some steps, and after.
function heldOut(name, title) {
  const points = run.curve.held_out.map((record) => [record.step, record[`eval_${name}`]]);
  if (run.results) {
    points.unshift([0, run.results.base[name]]);
    points.push([run.step, run.results.trained[name]]);
  }
  const xs = points.map((point) => point[0]);
  const ys = points.map((point) => point[1]);
  return { name: title, look: "more", xs, ys, dots: ys, full: true };
}

function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, value);
  }
  if (text !== undefined) element.textContent = text;
  return element;
}

// Return some round numbers between two.
function ticksBetween(least, most, count = 3) {
  const rough = (most - least) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const ticks = [];
  for (let tick = Math.ceil(least / unit) * unit; tick <= most + unit / 1e6; tick += unit) {
    ticks.push(Number(tick.toPrecision(6)));
  }
  return ticks;
}

function widthOfCurve() {
  return byId("curve").getBoundingClientRect().width;
}

function placeOfStep(step) {
  const width = widthOfCurve();
  return LEFT + ((width - LEFT - RIGHT) * step) / Math.max(run.step, 1);
}

function drawCurve() {
  const curve = byId("curve");
  const panels = panelsOfRun();
  const height = panels.reduce((sum, panel) => sum + PANEL_TOP + panel.height, 30);
  const width = widthOfCurve();
  curve.replaceChildren();
  curve.setAttribute("viewBox", `0 0 ${width} ${height}`);
  curve.setAttribute("height", height);
  curve.setAttribute("aria-label", describeCurve(panels));

  let top = 0;
  for (const panel of panels) {
    drawPanel(curve, panel, top + PANEL_TOP, width);
    top += PANEL_TOP + panel.height;
  }
  for (const step of ticksBetween(0, run.step, 6)) {
    if (!Number.isInteger(step)) continue;
    const x = placeOfStep(step);
    const anchor = x > width - 30 ? "end" : "middle";
    curve.append(svg("text", { x, y: top + 18, "text-anchor": anchor }, whole(step)));
  }
  curve.append(svg("text", { x: 0, y: top + 18 }, "step"));
  curve.append(svg("line", { id: "mark", class: "selected", y1: PANEL_TOP, y2: top + 4 }));
  markStep();
}

function describeCurve(panels) {
  const told = [];
  for (const series of panels.flatMap((panel) => panel.series)) {
    const known = series.ys.filter((y) => y !== null);
    if (known.length) told.push(`${series.name} from ${plain(known[0])} to ${plain(known.at(-1))}`);
  }
  return `Over the steps: ${told.join(", ")}`;
}

function drawPanel(curve, panel, top, width) {
  const all = panel.series.flatMap((series) => [...series.ys, ...(series.dots || [])]);
  const known = all.filter((y) => y !== null && y !== undefined);
  const least = Math.min(panel.least ?? Infinity, ...known);
  const most = Math.max(...known, least + 1e-9);
  const bottom = top + panel.height - 14;
  const toY = (y) => bottom - ((bottom - top - 8) * (y - least)) / (most - least);

  for (const tick of ticksBetween(least, most)) {
    const y = toY(tick);
    curve.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }));
    const place = { x: LEFT - 6, y: y + 4, "text-anchor": "end" };
    curve.append(svg("text", place, String(tick).replace("-", "−")));
  }
  let left = LEFT;
  for (const series of panel.series) {
    const label = svg("text", { x: left, y: top - 9, class: `name ${series.look}` }, series.name);
    curve.append(label);
    left += label.getComputedTextLength() + 18;
  }

  const lines = panel.series.map((series) => pointsOf(series.xs, series.ys, toY));
  if (panel.gap) {
    const around = [...lines[0], ...lines[1].toReversed()];
    curve.append(svg("polygon", { class: "gap", points: around.join(" ") }));
  }
  panel.series.forEach((series, place) => {
    const dots = pointsOf(series.xs, series.dots || [], toY);
    const look = `dot ${series.look} ${series.full ? "full" : ""}`;
    for (const [x, y] of dots) {
      curve.append(svg("circle", { class: look, cx: x, cy: y, r: series.full ? 3.5 : 2 }));
    }
    curve.append(svg("polyline", { class: `line ${series.look}`, points: lines[place].join(" ") }));
  });
}

// Return where points are in the picture, but for those that are no numbers.
function pointsOf(xs, ys, toY) {
  const points = [];
  ys.forEach((y, place) => {
    if (y !== null && y !== undefined) points.push([placeOfStep(xs[place]), toY(y)]);
  });
  return points;
}

// --------------------------------------------------------------------------- the steps
const shown = { place: 0, sort: "score", descending: true, opened: null, quantity: "score" };

function currentStep() {
  return run.steps[shown.place];
}

function markStep() {
  const mark = byId("mark");
  if (!run.steps || !run.steps.length) {
    mark.remove();
    return;
  }
  const x = placeOfStep(currentStep().step);
  mark.setAttribute("x1", x);
  mark.setAttribute("x2", x);
}

// Show another step, with the response open that scores best.
function showStep(place) {
  shown.place = place;
  const step = currentStep();
  const slider = byId("slider");
  slider.value = place;
  slider.setAttribute("aria-valuetext", `step ${step.step} of ${run.step}`);
  shown.opened = sortedBy([...step.responses], "score", true)[0] ?? null;
  markStep();
  showFiguresOfStep(step);
  showResponses();
}

function showFiguresOfStep(step) {
  const parts = [make("b", {}, `Step ${whole(step.step)}`), " of ", whole(run.step), ": score "];
  parts.push(make("b", { class: "more-text" }, signed(step.score)));
  if (step.success_rate !== null) parts.push(`, ${percent(step.success_rate, 0)} success`);
  const price = step.kl === null ? null : step.kl_coef * step.kl;
  parts.push(`; KL ${plain(step.kl)} nats, which cost ${plain(price)}`);
  const scaled = step.reward === null ? null : step.reward + price;
  parts.push(isScaled() ? `; as trained on the score is ${signed(scaled)}, and ` : "; ");
  parts.push(make("b", { class: "less-text" }, signed(step.reward)), " left.");
  byId("figures-of-step").replaceChildren(...parts);

  const title = `What it said in step ${whole(step.step)}`;
  const fewer = step.responses.length < step.count;
  const counts = `, the first ${step.responses.length} of ${step.count} responses`;
  byId("step-title").textContent = title + (fewer ? counts : "");
}

function showWhichSteps() {
  const numbers = run.steps.map((step) => step.step);
  if (numbers.length < run.step) {
    const few = numbers.slice(0, 3).map(whole).join(", ");
    byId("which-steps").textContent =
      `Of ${whole(run.step)} steps, ${numbers.length} are kept here, an even choice: ${few} …` +
      ` ${whole(numbers.at(-1))}. The responses of all steps are in samples.jsonl.`;
  }
  byId("mark-help").textContent = run.is_rule
    ? "Marked are the words that count."
    : "Marked is the token that earned most, where one earned something.";
}

function sortedBy(rows, name, descending) {
  const direction = descending ? -1 : 1;
  return rows.sort((one, other) => direction * ((one[name] ?? 0) - (other[name] ?? 0)));
}

// Let the buttons in a table's head sort its rows; render shows them anew.
function makeSortable(table, state, render) {
  for (const head of table.querySelectorAll("th[data-sort]")) {
    head.querySelector("button").addEventListener("click", () => {
      const name = head.dataset.sort;
      state.descending = state.sort === name ? !state.descending : true;
      state.sort = name;
      render();
    });
  }
}

function showOrder(table, state) {
  for (const head of table.querySelectorAll("th[data-sort]")) {
    const order = state.descending ? "descending" : "ascending";
    head.setAttribute("aria-sort", head.dataset.sort === state.sort ? order : "none");
  }
}

function showResponses() {
  const table = byId("responses");
  showOrder(table, shown);
  const rows = sortedBy([...currentStep().responses], shown.sort, shown.descending);
  const body = table.tBodies[0];
  body.replaceChildren();
  for (const response of rows) {
    const opener = make(
      "button",
      { type: "button", class: "opener" },
      make("span", {}, make("span", { class: "prompt" }, response.prompt), saidWithMarks(response)),
    );
    const isOpen = response === shown.opened && response.tokens !== null;
    opener.setAttribute("aria-expanded", isOpen);
    opener.disabled = response.tokens === null;
    opener.addEventListener("click", () => {
      toggle(response);
    });
    body.append(
      make(
        "tr",
        {},
        make("td", {}, opener),
        make("td", { class: "number" }, signed(response.score)),
        make("td", { class: "number" }, plain(response.kl)),
      ),
    );
    if (isOpen) body.append(make("tr", {}, openedCell(response)));
  }
}

function openedCell(response) {
  const cell = make("td", { class: "opened", colspan: 3 });
  cell.append(tokenPanel(response));
  return cell;
}

// Open a response or close it, and keep the focus on its button.
function toggle(response) {
  shown.opened = shown.opened === response ? null : response;
  showResponses();
  const rows = sortedBy([...currentStep().responses], shown.sort, shown.descending);
  document.querySelectorAll(".opener")[rows.indexOf(response)].focus();
}

// Return a response with what made its score marked; places count letters, as in Python.
function saidWithMarks(response) {
  const letters = Array.from(response.response);
  const said = make("span", { class: "said" });
  let last = 0;
  for (const [first, end] of response.marks) {
    if (first < last) continue;
    said.append(letters.slice(last, first).join(""));
    said.append(make("mark", {}, letters.slice(first, end).join("")));
    last = end;
  }
  said.append(letters.slice(last).join(""));
  return said;
}

// -------------------------------------------------------------------------- the tokens
// Return a quantity of all tokens of a response; null where it is no number.
function quantityOf(tokens, name) {
  if (name === "price") return tokens.kl.map((kl) => (kl === null ? null : run.kl_coef * kl));
  if (name === "reward") return less(tokens.score, tokens.kl, run.kl_coef);
  if (name === "change") return less(tokens.logprob, tokens.ref_logprob, 1);
  return tokens[name];
}

// Return first - factor * second for each token.
function less(first, second, factor) {
  return first.map((number, place) => {
    const other = second[place];
    return number === null || other === null ? null : number - factor * other;
  });
}

// Return the size at which a colour is full: of 99 in 100 tokens on the page it is not reached.
const fullColours = {};
function fullColour(name) {
  if (!(name in fullColours)) {
    const sizes = [];
    for (const step of run.steps) {
      for (const response of step.responses) {
        if (!response.tokens) continue;
        for (const number of quantityOf(response.tokens, name)) sizes.push(Math.abs(number ?? 0));
      }
    }
    sizes.sort((one, other) => one - other);
    fullColours[name] = sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes.at(-1) || 1;
  }
  return fullColours[name];
}

function tokenPanel(response) {
  const panel = byId("token-panel").content.cloneNode(true).firstElementChild;
  const line = panel.querySelector(".tokens");
  response.tokens.text.forEach((text, place) => {
    const token = make("button", { type: "button", class: "token" });
    // A token without a space before it goes on with the word, so it stands closer.
    token.classList.toggle("joined", place > 0 && /^\S/.test(text));
    token.append(tokenText(text, place === response.tokens.text.length - 1));
    token.append(make("span", { class: "figure" }));
    token.addEventListener("focus", () => chooseToken(panel, response, place));
    token.addEventListener("pointerenter", () => chooseToken(panel, response, place));
    line.append(token);
  });
  line.addEventListener("keydown", (event) => moveByKey(event, line));

  for (const row of panel.querySelectorAll("[data-quantity]")) {
    const radio = row.querySelector("input");
    radio.checked = row.dataset.quantity === shown.quantity;
    radio.addEventListener("change", () => {
      shown.quantity = row.dataset.quantity;
      colourTokens(panel, response);
    });
    if ("sums" in row.dataset) {
      const numbers = quantityOf(response.tokens, row.dataset.quantity);
      const sum = numbers.includes(null) ? null : numbers.reduce((a, b) => a + b, 0);
      row.querySelector(".sum").textContent = exact(sum);
    }
  }
  panel.querySelector(".sum-help").textContent =
    "The KLs of the tokens add up to the KL of the response, and what they earned to " +
    (run.score_prefixes
      ? "how much its score, as trained on, is above that of an empty response."
      : "its score, as trained on: the last token gets it all.");
  colourTokens(panel, response);
  chooseToken(panel, response, bestToken(response));
  return panel;
}

// Return a token's text as it can be seen: some have none of their own.
function tokenText(text, isLast) {
  const seen = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  if (seen.trim()) return make("span", { class: "text" }, seen.trim());
  const names = seen ? "space" : isLast ? "end" : "part";
  return make("span", { class: "text empty" }, names);
}

function bestToken(response) {
  const scores = response.tokens.score;
  return scores.indexOf(Math.max(...scores));
}

function colourTokens(panel, response) {
  const numbers = quantityOf(response.tokens, shown.quantity);
  const full = fullColour(shown.quantity);
  panel.querySelectorAll(".token").forEach((token, place) => {
    const number = numbers[place];
    const strength = Math.min(Math.abs(number ?? 0) / full, 1);
    token.classList.toggle("above", number > 0);
    token.classList.toggle("below", number < 0);
    token.style.setProperty("--strength", `${Math.round(80 * strength)}%`);
    token.querySelector(".figure").textContent = signed(number);
  });
  panel.querySelector(".least").textContent = signed(-full);
  panel.querySelector(".most").textContent = signed(full);
  for (const row of panel.querySelectorAll("[data-quantity]")) {
    row.classList.toggle("chosen", row.dataset.quantity === shown.quantity);
  }
}

// Show the numbers of one token; it alone is reached by Tab, the others by arrow keys.
function chooseToken(panel, response, place) {
  panel.querySelectorAll(".token").forEach((token, other) => {
    token.setAttribute("aria-pressed", other === place);
    token.tabIndex = other === place ? 0 : -1;
  });
  const text = panel.querySelectorAll(".token .text")[place].textContent.trim();
  panel.querySelector(".which").textContent = text;
  for (const row of panel.querySelectorAll("[data-quantity]")) {
    const number = quantityOf(response.tokens, row.dataset.quantity)[place];
    row.querySelector(".value").textContent = exact(number);
  }
}

function moveByKey(event, line) {
  const tokens = [...line.children];
  const place = tokens.indexOf(document.activeElement);
  const places = {
    ArrowRight: place + 1,
    ArrowLeft: place - 1,
    Home: 0,
    End: tokens.length - 1,
  };
  const token = tokens[places[event.key]];
  if (token) {
    event.preventDefault();
    token.focus();
  }
}

// ------------------------------------------------------------------- before and after
function showMeasured() {
  if (!run.measured.length) return;
  const section = byId("measured");
  section.hidden = false;
  if (run.is_rule) byId("measured-help").textContent = "Marked are the words that count.";
  const groups = run.measured.map((row) => {
    const isCut = row.count > row.pairs.length;
    const fewer = isCut ? `, the first ${row.pairs.length} of ${row.count}` : "";
    return {
      title: `${row.prompt} …`,
      note: `${row.held_out ? "held out, never trained on" : "trained on"}${fewer}`,
      pairs: row.pairs.map(([before, after]) => [
        measuredCell(before, `score ${signed(before.score)}`),
        measuredCell(after, `score ${signed(after.score)}, KL ${plain(after.kl)}`),
      ]),
    };
  });
  section.append(pairsTable(groups));
}

function measuredCell(response, figures) {
  return make("td", {}, saidWithMarks(response), make("span", { class: "count" }, figures));
}

// Return a table of cells before and after, in groups that have a title and a note each.
function pairsTable(groups) {
  const titles = ["Before", "After"].map((text) => make("th", { scope: "col" }, text));
  const table = make("table", { class: "pairs" }, make("thead", {}, make("tr", {}, ...titles)));
  for (const { title, note, pairs } of groups) {
    const about = make("th", { class: "group", colspan: 2, scope: "rowgroup" }, title, " ");
    about.append(make("span", { class: "count" }, note));
    const rows = pairs.map((cells) => make("tr", {}, ...cells));
    table.append(make("tbody", {}, make("tr", {}, about), ...rows));
  }
  return table;
}

// ----------------------------------------------------------- the stages before PPO
function showAnswers() {
  const section = byId("answers");
  section.hidden = !run.answers.length;
  const groups = run.answers.map(({ prompt, before, after }) => {
    const cells = [before, after].map((text) => make("td", { class: "said" }, text.trim()));
    return { title: prompt, note: "", pairs: [cells] };
  });
  section.append(pairsTable(groups));
}

function showExamples() {
  const section = byId("examples");
  section.hidden = !run.examples.length;
  for (const example of run.examples) {
    const title = make("h3", {}, example.asked, " ");
    title.append(make("span", { class: "count" }, example.held_out ? "held out" : "trained on"));
    const tokens = example.text.map((text, place) =>
      make("span", { class: example.learned[place] ? "learned" : "read" }, text),
    );
    section.append(title, make("div", { class: "example" }, ...tokens));
  }
}

function showComparisons() {
  byId("comparisons").hidden = !run.comparisons.length;
  const table = byId("compared");
  const state = { sort: "margin", descending: true };
  for (const row of run.comparisons) {
    row.margin = (row.better_score ?? 0) - (row.worse_score ?? 0);
  }
  const render = () => {
    showOrder(table, state);
    const rows = sortedBy([...run.comparisons], state.sort, state.descending);
    table.tBodies[0].replaceChildren(...rows.map(comparisonRow));
  };
  makeSortable(table, state, render);
  render();
}

function comparisonRow(row) {
  const cells = ["better", "worse"].map((name) => {
    const text = row[name];
    if (text === null) return make("td", { class: "quiet" }, "–");
    const score = make("span", { class: "count" }, ` score ${signed(row[`${name}_score`])}`);
    return make("td", {}, make("span", { class: "said" }, text), score);
  });
  const margin = make("td", { class: "number" }, signed(row.margin));
  margin.classList.add(row.margin < 0 ? "less-text" : "more-text");
  return make("tr", {}, ...cells, margin);
}

function showCalibration() {
  const bins = run.results ? run.results.trained.calibration : [];
  const section = byId("calibration");
  section.hidden = !bins.length;
  for (const bin of bins) {
    const cells = [percent(bin.predicted, 0), percent(bin.observed, 0), whole(bin.comparisons)];
    const row = make("tr", {}, ...cells.map((text) => make("td", {}, text)));
    section.querySelector("tbody").append(row);
  }
}

// --------------------------------------------------------------------------- the page
function watchSteps() {
  const slider = byId("slider");
  if (!run.steps.length) {
    byId("step").remove();
    slider.parentElement.remove();
    return;
  }
  slider.max = run.steps.length - 1;
  slider.addEventListener("input", () => showStep(Number(slider.value)));
  byId("curve").addEventListener("click", (event) => {
    const x = event.clientX - byId("curve").getBoundingClientRect().left;
    const distances = run.steps.map((step) => Math.abs(placeOfStep(step.step) - x));
    showStep(distances.indexOf(Math.min(...distances)));
  });
  makeSortable(byId("responses"), shown, showResponses);
  showWhichSteps();
  showStep(run.steps.length - 1);
}

showHeader();
showResult();
drawCurve();
window.addEventListener("resize", drawCurve);
if (run.script === "train_rlhf") {
  watchSteps();
  showMeasured();
} else if (run.script === "train_sft") {
  showAnswers();
  showExamples();
} else {
  showComparisons();
  showCalibration();
}
