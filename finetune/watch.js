
"use strict";

document.documentElement.classList.add("ready");

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
  byId("title").textContent = `${run.model}, ${TITLES[run.script]}`;
  document.title = byId("title").textContent;

  const facts = [];
  if (run.reward) facts.push(`reward ${run.reward}`);
  if (run.data) facts.push(`data ${run.data}`);
  facts.push(`${whole(run.samples)} ${LEARNED_FROM[run.script]}`);
  facts.push(`${whole(run.step)} steps`);
  facts.push(`${run.seconds.toFixed(0)} seconds${run.device ? ` on ${run.device}` : ""}`);
  facts.push(`seed\u00a0${run.seed}`);
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
  if (run.words) showRule();
  if (run.is_scaled) showScale();
  const accuracy = run.scale?.accuracy ?? null;
  if (accuracy !== null) {
    byId("proxy").textContent =
      "The score is a proxy: it is the opinion of a reward model, " +
      `${run.reward}, which agrees with ${percent(accuracy, 0)} of held-out comparisons. ` +
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
    : `of responses score above ${plain(run.scale.threshold)}`;
  showHeadline(percent(before.success_rate, 0), percent(after.success_rate, 0), unit);
  byId("verdict").textContent = `Mean score ${scores}, ${cost}. ${learnedOrNot()}`;
}

// Say what the script's own reward counts; the words are folded away.
function showRule() {
  const words = run.words.length === 1 ? "this word" : `one of ${run.words.length} words`;
  byId("rule").hidden = false;
  byId("rule").append(
    make("summary", {}, `A response scores +1 if it has ${words}, else −1.`),
    make("p", { class: "quiet" }, `One is enough: ${run.words.join(", ")}`),
  );
}

// Say what graded scores are put on; while a run goes on that is not known.
function showScale() {
  const { mean, deviation } = run.scale || {};
  byId("scale").hidden = false;
  byId("scale").textContent =
    "Scores are put on another scale before they are trained on" +
    (run.scale?.deviation
      ? `: ${brief(mean, 4)} counts as 0, ${brief(deviation, 4)} points are about 1, and what is far ` +
        "from there counts by its logarithm."
      : ".");
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
const LEFT = 56;
const RIGHT = 12;
const PANEL_TOP = 26;

function panelsOfRun() {
  const curve = run.curve;
  const xs = curve.step;
  if (run.script === "train_rlhf") {
    const score = {
      name: run.is_scaled ? "scaled score" : "score",
      look: "more",
      xs,
      ys: curve.mean_scaled,
      dots: curve.scaled,
    };
    const reward = { name: "score − price of KL", look: "less dash", xs, ys: curve.mean_reward };
    const kl = { name: "KL in nats", look: "ink", xs, ys: curve.mean_kl, dots: curve.kl };
    return [
      { height: 190, series: [score, reward], gap: true, measured: measuredScores() },
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

// Return the mean scores before and after; what was trained on another scale has no place here.
function measuredScores() {
  if (!run.results || run.is_scaled) return null;
  const { base, trained } = run.results;
  byId("measured-dots").hidden = false;
  return { xs: [0, run.step], ys: [base.train_prompts.score, trained.train_prompts.score] };
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

// Return round numbers between two, as few as there can be but so many at least.
function ticksBetween(least, most, wanted) {
  const power = Math.floor(Math.log10(most - least));
  let ticks = [];
  for (const factor of [10, 5, 2, 1, 0.5, 0.2, 0.1]) {
    const unit = factor * 10 ** power;
    const first = Math.ceil(least / unit - 1e-6);
    const last = Math.floor(most / unit + 1e-6);
    const multiples = Array.from({ length: last - first + 1 }, (_, i) => (first + i) * unit);
    ticks = multiples.map((tick) => Number(tick.toPrecision(12)));
    if (ticks.length >= wanted) break;
  }
  return ticks;
}

// Return a number in as few signs as it takes.
function brief(number, digits = 12) {
  const size = Math.abs(number);
  const rounded = Number(number.toPrecision(digits));
  const text = size && (size >= 1e7 || size < 1e-4) ? rounded.toExponential() : String(rounded);
  return text.replaceAll("-", "−").replace("e+", "e");
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

  // It stands behind the dots of its step.
  const mark = svg("line", { id: "mark", class: "selected", y1: PANEL_TOP, y2: height - 26 });
  curve.append(mark);
  let top = 0;
  for (const panel of panels) {
    drawPanel(curve, panel, top + PANEL_TOP, width);
    top += PANEL_TOP + panel.height;
  }
  for (const step of ticksBetween(0, run.step, 4)) {
    if (!Number.isInteger(step)) continue;
    const x = placeOfStep(step);
    const label = whole(step);
    const anchor = x + 4 * label.length > width ? "end" : "middle";
    curve.append(svg("text", { x, y: top + 18, "text-anchor": anchor }, label));
  }
  curve.append(svg("text", { x: 0, y: top + 18 }, "step"));
  markStep();
}

function describeCurve(panels) {
  const changes = [];
  for (const series of panels.flatMap((panel) => panel.series)) {
    const known = series.ys.filter((y) => y !== null);
    const [first, last] = [known[0], known.at(-1)];
    if (known.length) changes.push(`${series.name} from ${plain(first)} to ${plain(last)}`);
  }
  return `Over the steps: ${changes.join(", ")}`;
}

function drawPanel(curve, panel, top, width) {
  drawNames(curve, panel, top);
  const all = panel.series.flatMap((series) => [...series.ys, ...(series.dots || [])]);
  all.push(...(panel.measured?.ys ?? []));
  const known = all.filter((y) => y !== null && y !== undefined);
  if (!known.length) return;
  const least = Math.min(panel.least ?? Infinity, ...known);
  const span = Math.max(...known) - least;
  // A flat curve gets some height.
  const most = least + Math.max(span, Math.max(Math.abs(least), 1) * (span ? 1e-9 : 0.01));
  const bottom = top + panel.height - 14;
  const toY = (y) => bottom - ((bottom - top - 8) * (y - least)) / (most - least);

  for (const tick of ticksBetween(least, most, panel.height > 150 ? 3 : 2)) {
    const y = toY(tick);
    curve.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }));
    const place = { x: LEFT - 6, y: y + 4, "text-anchor": "end" };
    curve.append(svg("text", place, brief(tick)));
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
  const { xs, ys } = panel.measured ?? { xs: [], ys: [] };
  for (const [x, y] of pointsOf(xs, ys, toY)) {
    curve.append(svg("circle", { class: "dot more full", cx: x, cy: y, r: 4.5 }));
  }
}

function drawNames(curve, panel, top) {
  const labels = panel.series.map((series) => {
    return svg("text", { y: top - 9, class: `name ${series.look}` }, series.name);
  });
  curve.append(...labels);
  const widths = labels.map((label) => label.getComputedTextLength() + 14);
  const total = widths.reduce((sum, width) => sum + width, 0);

  // On a phone there may be no room for them but above the axis too.
  let left = Math.max(Math.min(LEFT, widthOfCurve() - total + 14), 0);
  labels.forEach((label, place) => {
    label.setAttribute("x", left);
    left += widths[place];
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

// Return the place of the step that is kept and nearest to a number.
function nearestPlace(number) {
  const distances = run.steps.map((step) => Math.abs(step.step - number));
  return distances.indexOf(Math.min(...distances));
}

// Show another step, with the response open that scores best.
function showStep(place) {
  shown.place = place;
  const step = currentStep();
  const slider = byId("slider");
  slider.setAttribute("aria-valuetext", `step ${step.step} of ${run.total_steps}`);
  shown.opened = sortedBy([...step.responses], "score", true)[0] ?? null;
  markStep();
  showFiguresOfStep(step);
  showResponses();
}

function showFiguresOfStep(step) {
  const price = step.kl === null ? null : step.kl_coef * step.kl;
  // Blue is what the curve shows.
  const plotted = make("b", { class: "more-text" }, signed(step.scaled));
  const score = run.is_scaled ? [signed(step.score), ", as trained on ", plotted] : [plotted];
  byId("figures-of-step").replaceChildren(
    make("b", {}, `Step ${whole(step.step)}`),
    ` of ${whole(run.total_steps)}: score `,
    ...score,
    inSuccess(step.success_rate),
    `; KL ${plain(step.kl)} nats, which cost ${plain(price)}; `,
    make("b", { class: "less-text" }, signed(step.reward)),
    " left. ",
    make("span", { class: "count" }, meanOfStep(step)),
  );

  const title = `What it said in step ${whole(step.step)}`;
  const fewer = step.responses.length < step.count;
  const counts = `, the first ${step.responses.length} of ${step.count} responses`;
  byId("step-title").textContent = title + (fewer ? counts : "");
}

function inSuccess(rate) {
  return rate === null ? "" : `, ${percent(rate, 0)} success`;
}

// Return the figures that the screen has at this step.
function meanOfStep(step) {
  const figures = signed(step.mean_score) + inSuccess(step.mean_success_rate);
  return `The mean of the last 100 responses: ${figures}.`;
}

function showWhichSteps() {
  const numbers = run.steps.map((step) => whole(step.step));
  const sentences = [];
  if (numbers.length < run.step) {
    const many = `${numbers.slice(0, 3).join(", ")} … ${numbers.at(-1)}`;
    const which = numbers.length > 4 ? many : numbers.join(", ");
    sentences.push(`Of ${whole(run.step)} steps, ${numbers.length} are kept here: ${which}.`);
  }
  if (run.last_step_with_samples < run.step) {
    const last = whole(run.last_step_with_samples);
    sentences.push(`In samples.jsonl those after step ${last} are missing.`);
  } else if (sentences.length) {
    sentences.push("The responses of all steps are in samples.jsonl.");
  }
  byId("which-steps").textContent = sentences.join(" ");
  byId("mark-help").textContent = whatIsMarked();
}

function whatIsMarked() {
  if (run.is_rule) return "Marked are the words that count; one is enough.";
  if (!run.score_prefixes) return "";
  const most = run.scored_places ? "are the tokens" : "is the token";
  return `Marked ${most} that earned most, where any earned something.`;
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
  const count = response.tokens.text.length;
  panel.classList.toggle("long", count > 60);
  response.tokens.text.forEach((text, place) => {
    if (place > 0 && run.scored_places?.includes(place)) line.append(make("i", { class: "asked" }));
    const token = make("button", { type: "button", class: "token" });
    // A token without a space before it goes on with the word, so it stands closer.
    token.classList.toggle("joined", place > 0 && /^\S/.test(text));
    token.append(tokenText(text, place === count - 1));
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
      row.querySelector(".sum").textContent = exact(sumOf(numbers));
    }
  }
  panel.querySelector(".asked-help").textContent = whereAsked(count);
  panel.querySelector(".earned-help").textContent = whatEarned(response);
  panel.querySelector(".score-help").textContent = SCORE_EARNED[scoring()];
  colourTokens(panel, response);
  if (count) chooseToken(panel, response, bestToken(response));
  return panel;
}

// Return how often a response is scored: after each token, after some, or as a whole.
function scoring() {
  if (!run.score_prefixes) return "whole";
  return run.scored_places ? "some" : "each";
}

const SCORE_EARNED = {
  each: "What the token added to the score of the text so far.",
  some: "What the tokens up to this one, since the thin line before, added to the score.",
  whole: "The last token gets the whole score.",
};

// Say where the score of a response of so many tokens was asked.
function whereAsked(count) {
  if (!run.scored_places) return "";
  const inside = run.scored_places.filter((place) => place > 0 && place < count).length;
  if (!inside) return "The score was asked at the end alone: the last token earned it all.";
  const places = inside === 1 ? "1 place, the thin line" : `${inside} places, the thin lines`;
  return (
    `The score was asked at ${places}, and at the end: the last token before each earned what ` +
    "the tokens since the one before added."
  );
}

// Say with the numbers of a response how what its tokens earned is its score.
function whatEarned(response) {
  const earned = sumOf(response.tokens.score);
  if (earned === null || response.score === null) return "";
  const scores = `the response scores ${signed(response.score)}`;
  if (scoring() === "whole") {
    const scaled = run.is_scaled ? `, which is ${signed(earned)} as trained on` : "";
    return `T${scores.slice(1)}${scaled}; the last token gets it all.`;
  }
  if (run.is_scaled) {
    return (
      `The tokens earned ${signed(earned)}: so much more than an empty text the response is ` +
      `worth, as trained on. T${scores.slice(1)}.`
    );
  }
  const empty = signed(response.score - earned);
  return `An empty text scores ${empty}; the tokens added ${signed(earned)}; ${scores}.`;
}

function sumOf(numbers) {
  return numbers.includes(null) ? null : numbers.reduce((sum, number) => sum + number, 0);
}

// Return a token's text as it can be seen: some have none of their own.
function tokenText(text, isLast) {
  const seen = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  if (seen.trim()) return make("span", { class: "text" }, seen.trim());
  const names = seen ? "space" : isLast ? "end" : "part";
  return make("span", { class: "text empty" }, names);
}

function bestToken(response) {
  const scores = response.tokens.score.map((score) => score ?? -Infinity);
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
  panel.querySelector(".least").textContent = `≤ ${signed(-full)}`;
  panel.querySelector(".most").textContent = `≥ ${signed(full)}`;
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
  const tokens = [...line.querySelectorAll(".token")];
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
    byId("slider-help").remove();
    slider.parentElement.remove();
    return;
  }
  slider.max = run.step;
  slider.addEventListener("input", () => showStep(nearestPlace(Number(slider.value))));
  slider.addEventListener("change", settleSlider);
  byId("curve").addEventListener("click", (event) => {
    const x = event.clientX - byId("curve").getBoundingClientRect().left;
    const span = placeOfStep(run.step) - placeOfStep(0);
    showStep(nearestPlace((run.step * (x - placeOfStep(0))) / span));
    settleSlider();
  });
  makeSortable(byId("responses"), shown, showResponses);
  showWhichSteps();
  showStep(run.steps.length - 1);
  settleSlider();
}

// Put the slider on the step that is shown; a move too small for another step goes to the next.
function settleSlider() {
  const slider = byId("slider");
  const moved = Math.sign(Number(slider.value) - currentStep().step);
  const next = shown.place + moved;
  if (moved && shown.place === shown.settled && run.steps[next]) showStep(next);
  shown.settled = shown.place;
  slider.value = currentStep().step;
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
