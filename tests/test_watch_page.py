"""watch.html in a real browser, as somebody uses it: with a pointer, with keys, on a phone."""

import json
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import page_content, read_metrics, read_rows, write_run

from finetune import watch
from finetune.progress import recent

ROOT = Path(__file__).resolve().parent.parent

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

DESKTOP, PHONE, SMALL_PHONE = (1100, 900), (375, 800), (320, 640)
HOSTILE = [
    "</script><script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 2'>",
    " <!-- \"quoted\" & 'so' --",
    "\u2028{{SCRIPT}}",
]


@pytest.fixture(scope="module")
def browser():
    """Return Debian's Chromium, without a screen."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        window = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as error:
        pytest.skip(f"chromium does not start: {str(error).splitlines()[0]}")
    yield window
    window.quit()


@pytest.fixture
def look(browser):
    """Open a page at a size, light or dark; at the end nothing may have gone wrong in it."""

    def start(path, size=DESKTOP, scheme="light"):
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        metrics["mobile"] = size != DESKTOP
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(path.as_uri())
        return browser

    yield start
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def trained(run_script, demo_model, tmp_path_factory):
    """Return the folder of a short run that came to its end."""
    cwd = tmp_path_factory.mktemp("trained")
    flags = ["--device", "cpu", "--dtype", "float32", "--training-epochs", "25"]
    run = run_script(cwd, "--model-name", demo_model, *flags, "--eval-samples", "12")
    assert run.status == 0, run.stderr
    return cwd / "trained_model"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return the page of a run of 12,000 samples."""
    return watch.write_page(write_run(tmp_path_factory.mktemp("large"), 1200))


def texts_of(browser, selector):
    """Return the texts of what is shown there, without what is around them."""
    elements = browser.find_elements(By.CSS_SELECTOR, selector)
    return [element.get_property("textContent") for element in elements]


def numbers_of(browser, selector):
    """Return the numbers that are shown there."""
    return [number_in(text) for text in texts_of(browser, selector)]


def number_in(text):
    return float(text.replace("\u2212", "-"))


def set_slider(browser, step):
    """Move the slider as its thumb does."""
    code = "const slider = document.getElementById('slider'); slider.value = arguments[0];"
    browser.execute_script(code + "slider.dispatchEvent(new Event('input'));", step)


def press(browser, *keys):
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def value_of(browser, quantity):
    (number,) = numbers_of(browser, f"[data-quantity={quantity}] .value")
    return number


# ------------------------------------------------------------------------ what one sees
def test_at_first_the_last_step_is_shown_with_its_best_response_open(look, trained):
    browser = look(trained / "watch.html")
    report = json.loads((trained / "report.json").read_text())
    after = report["trained"]["train_prompts"]
    assert f"{100 * after['success_rate']:.0f} %" in texts_of(browser, "#headline")[0]
    assert texts_of(browser, "#step-title") == ["What it said in step 15"]
    rows = [row for row in read_rows(trained / "samples.jsonl") if row["step"] == 15]
    best = max(rows, key=lambda row: row["score"])
    assert texts_of(browser, ".opener[aria-expanded=true] .said") == [best["response"]]
    assert len(texts_of(browser, ".token")) == len(best["tokens"]["text"])
    assert len(texts_of(browser, "#measured .group")) == 12


def test_the_slider_changes_the_table_and_the_mark(look, trained):
    browser = look(trained / "watch.html")
    rows = read_rows(trained / "samples.jsonl")
    places = []
    for step in (1, 8, 15):
        set_slider(browser, step)
        wanted = [row for row in rows if row["step"] == step]
        shown = texts_of(browser, "#responses .opener > span")
        assert sorted(shown) == sorted(row["prompt"] + row["response"] for row in wanted)
        record = read_metrics(trained)[step - 1]
        (told,) = texts_of(browser, "#figures-of-step")
        assert told.startswith(
            f"Step {step} of 15: score {record['score']:+.2f}".replace("-", "\u2212")
        )
        assert f"KL {record['kl']:.2f} nats" in told
        # The screen has means, and so has the end of the line.
        screen = recent(read_metrics(trained)[:step], "score")
        mean = f"The mean of the last 100 responses: {screen:+.2f}, ".replace("-", "\u2212")
        assert mean in told
        mark = browser.find_element(By.ID, "mark")
        places.append(float(mark.get_attribute("x1")))
    assert places == sorted(set(places))

    # The arrow keys move it too, and a click on the curve.
    browser.find_element(By.ID, "slider").send_keys(Keys.ARROW_LEFT)
    assert texts_of(browser, "#step-title") == ["What it said in step 14"]
    browser.find_element(By.ID, "curve").click()
    (title,) = texts_of(browser, "#step-title")
    assert title in ("What it said in step 7", "What it said in step 8")


def test_the_table_is_sorted_by_its_heads(look, trained):
    browser = look(trained / "watch.html")
    set_slider(browser, 11)
    for name, column in (("kl", 3), ("score", 2)):
        head = browser.find_element(By.CSS_SELECTOR, f"#responses th[data-sort={name}]")
        for order, reverse in (("descending", True), ("ascending", False)):
            if head.get_attribute("aria-sort") != order:
                head.find_element(By.TAG_NAME, "button").click()
            assert head.get_attribute("aria-sort") == order
            numbers = numbers_of(browser, f"#responses td.number:nth-child({column})")
            assert len(numbers) == 10 and numbers == sorted(numbers, reverse=reverse)


def test_the_numbers_of_tokens_are_those_of_samples_jsonl_and_sum_to_metrics_jsonl(look, trained):
    browser = look(trained / "watch.html")
    set_slider(browser, 13)
    rows = [row for row in read_rows(trained / "samples.jsonl") if row["step"] == 13]
    record = read_metrics(trained)[12]
    kls = []
    for place in range(10):
        opener = browser.find_elements(By.CSS_SELECTOR, ".opener")[place]
        if opener.get_attribute("aria-expanded") == "false":
            opener.click()
        (said,) = texts_of(browser, ".opener[aria-expanded=true] > span")
        (row,) = (row for row in rows if row["prompt"] + row["response"] == said)
        tokens = row["tokens"]
        shown = {name: [] for name in ("score", "kl", "value", "advantage", "reward", "change")}
        for token in browser.find_elements(By.CSS_SELECTOR, ".token"):
            browser.execute_script("arguments[0].focus()", token)
            for name, numbers in shown.items():
                numbers.append(value_of(browser, name))
        for name in ("score", "kl", "value", "advantage"):
            assert shown[name] == pytest.approx(tokens[name], rel=1e-3, abs=1e-5), name
        pairs = zip(tokens["score"], tokens["kl"])
        rewards = [score - 0.1 * kl for score, kl in pairs]
        assert shown["reward"] == pytest.approx(rewards, rel=1e-3, abs=1e-5)
        pairs = zip(tokens["logprob"], tokens["ref_logprob"])
        changes = [logprob - ref_logprob for logprob, ref_logprob in pairs]
        assert shown["change"] == pytest.approx(changes, rel=1e-3, abs=1e-5)
        kls.append(numbers_of(browser, "[data-quantity=kl] .sum")[0])
    assert sum(kls) / 10 == pytest.approx(record["kl"], rel=1e-3)
    scores = numbers_of(browser, "#responses td.number:nth-child(2)")
    assert sum(scores) / 10 == pytest.approx(record["score"])


def test_the_colour_tells_the_chosen_quantity(look, trained):
    browser = look(trained / "watch.html")
    for name in ("kl", "price", "reward", "value", "advantage", "change", "score"):
        browser.find_element(By.CSS_SELECTOR, f"[data-quantity={name}] input").click()
        assert len(texts_of(browser, "tr.chosen")) == 1
        for token in browser.find_elements(By.CSS_SELECTOR, ".token"):
            number = number_in(token.find_element(By.CSS_SELECTOR, ".figure").text)
            look_of_it = token.get_attribute("class").split()
            assert number <= 0 or "above" in look_of_it
            assert number >= 0 or "below" in look_of_it
            strength = token.value_of_css_property("--strength")
            assert (strength == "80%") <= (number != 0)


# ----------------------------------------------------------------------------- by keyboard
def test_keys_alone_open_a_response_and_read_a_token(look, trained):
    browser = look(trained / "watch.html")
    for _ in range(100):
        press(browser, Keys.TAB)
        element = browser.switch_to.active_element
        if element.get_attribute("aria-expanded") == "false":
            break
    press(browser, Keys.ENTER)
    element = browser.switch_to.active_element
    assert element.get_attribute("aria-expanded") == "true"
    said = element.find_element(By.CSS_SELECTOR, ".said").get_property("textContent")
    rows = [row for row in read_rows(trained / "samples.jsonl") if row["step"] == 15]
    (tokens,) = (row["tokens"] for row in rows if row["response"] == said)

    press(browser, Keys.TAB)
    assert "token" in browser.switch_to.active_element.get_attribute("class")
    press(browser, Keys.HOME)
    for kl in tokens["kl"]:
        assert value_of(browser, "kl") == pytest.approx(kl, rel=1e-3, abs=1e-5)
        press(browser, Keys.ARROW_RIGHT)
    press(browser, Keys.END, Keys.ARROW_LEFT)
    assert value_of(browser, "kl") == pytest.approx(tokens["kl"][-2], rel=1e-3, abs=1e-5)

    # The next stop is the choice of the colour, and arrow keys make it.
    press(browser, Keys.TAB)
    press(browser, Keys.ARROW_DOWN)
    assert "KL" in texts_of(browser, "tr.chosen th")[0]

    opener = browser.find_element(By.CSS_SELECTOR, ".opener[aria-expanded=true]")
    opener.send_keys(Keys.SPACE)
    assert texts_of(browser, ".token") == []


# ---------------------------------------------------------------------------- no harm done
def test_what_a_model_says_is_shown_as_text_and_nothing_runs(look, tmp_path):
    folder = write_run(tmp_path, 3, texts=HOSTILE, positive_words=["quoted"])
    browser = look(watch.write_page(folder))
    assert browser.execute_script("return window.ran") is None
    assert texts_of(browser, ".said") == ["".join(HOSTILE)] * 10
    assert texts_of(browser, ".said mark") == ["quoted"] * 10
    assert texts_of(browser, ".token .text") == [text.strip() for text in HOSTILE]
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2


def test_no_request_leaves_the_page(look, trained, browser):
    """Asked from a server, that one hears of nothing but the page."""
    heard = []

    class Listener(SimpleHTTPRequestHandler):
        def log_message(self, form, *arguments):
            heard.append(self.path)

    handler = partial(Listener, directory=trained)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{server.server_port}/watch.html")
        set_slider(browser, 3)
        resources = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        assert browser.execute_script(resources) == []
        server.shutdown()
    assert heard == ["/watch.html"]


# ---------------------------------------------------------------------------- everywhere
def luminance(colour):
    """Return the relative luminance of rgb(…), as WCAG defines it."""
    numbers = colour.partition("(")[2].rstrip(")").split(",")[:3]
    shares = [float(number) / 255 for number in numbers]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


# A colour as the screen has it, mixed ones too: a canvas knows.
PAINTED = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const paint = (colours) => {
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return "rgb(" + canvas.getImageData(0, 0, 1, 1).data.slice(0, 3).join(",") + ")";
};
return [...document.querySelectorAll(arguments[0])].map((element) => {
  const behind = [];
  for (let one = element; one; one = one.parentElement) {
    behind.unshift(getComputedStyle(one).backgroundColor);
  }
  return [paint(behind), paint([...behind, getComputedStyle(element).color])];
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_can_be_read_in_light_and_dark(look, trained, scheme):
    browser = look(trained / "watch.html", scheme=scheme)
    (paper, ink), *_ = browser.execute_script(PAINTED, "body")
    assert (luminance(paper) > luminance(ink)) == (scheme == "light")
    for name in ("score", "kl", "advantage", "change"):
        browser.find_element(By.CSS_SELECTOR, f"[data-quantity={name}] input").click()
        everything = (
            "h1, h2, p, dfn, code, mark, th, td, b, button, .figure, .text, .prompt, .count"
        )
        for behind, colour in browser.execute_script(PAINTED, everything):
            assert contrast(behind, colour) >= 4.5, (behind, colour)


@pytest.mark.parametrize("size", [PHONE, SMALL_PHONE], ids=["phone", "small"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_goes_beyond_the_edge(look, trained, scheme, size):
    browser = look(trained / "watch.html", size, scheme)
    for step in (1, 8, 15):
        set_slider(browser, step)
        widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
        assert browser.execute_script(widths) == [size[0], size[0]]
    edges = "return [...document.querySelectorAll('td, th, .token')].map("
    edges += "(element) => element.getBoundingClientRect().right)"
    assert max(browser.execute_script(edges)) <= size[0]


def test_long_words_and_prompts_stay_on_a_phone(look, tmp_path):
    texts = [" " + "verylongword" * 30, "x" * 200, "\n" * 5]
    browser = look(watch.write_page(write_run(tmp_path, 2, texts=texts)), PHONE)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 375


# ------------------------------------------------------------------------------- how fast
def test_a_page_of_12_000_samples_is_there_within_two_seconds(look, large):
    assert large.stat().st_size <= 2_000_000
    look(large)  # the browser has started
    begin = time.perf_counter()
    browser = look(large)
    shown = texts_of(browser, ".opener")
    seconds = time.perf_counter() - begin
    assert len(shown) == 10
    assert seconds < 2
    begin = time.perf_counter()
    set_slider(browser, 5)
    assert time.perf_counter() - begin < 1
    kept = len(page_content(large)["steps"])
    (told,) = texts_of(browser, "#which-steps")
    assert told.startswith(f"Of 1,200 steps, {kept} are kept here: 1, ")


# ------------------------------------------------------------------- other runs
def test_a_run_that_goes_on_has_no_after_yet(look, tmp_path):
    browser = look(watch.write_page(write_run(tmp_path, 4, total=9)))
    (status,) = texts_of(browser, "#status")
    assert status.startswith("The run still goes on, or was stopped: 4 of 9 steps are done.")
    assert texts_of(browser, "#headline") == []
    assert not browser.find_element(By.ID, "measured").is_displayed()
    assert len(texts_of(browser, ".opener")) == 10
    assert texts_of(browser, "#figures-of-step")[0].startswith("Step 4 of 9: ")


def change_metrics(folder, **figures):
    """Change figures of all steps of a run that was written."""
    metrics = [record | figures for record in read_rows(folder / "metrics.jsonl")]
    lines = [json.dumps(record) + "\n" for record in metrics]
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    "figures",
    [
        {"kl": None, "reward": None, "score": None},
        {"reward": 1e16, "score": 1e16, "kl": 0.0},
        {"reward": 5e6, "score": 5e6, "kl": 0.0},
        {"reward": 1e-7, "score": 1e-7, "kl": 1e-5},
    ],
)
def test_whatever_the_figures_are_the_page_is_there_at_once(look, tmp_path, figures):
    """Ticks were once added up, for ever where there is nothing between them."""
    folder = write_run(tmp_path, 3)
    change_metrics(folder, **figures)
    path = watch.write_page(folder)
    begin = time.perf_counter()
    browser = look(path)
    assert len(texts_of(browser, ".opener")) == 10
    assert time.perf_counter() - begin < 3
    labels = texts_of(browser, "#curve text[text-anchor=end]")
    assert len(labels) == len({*labels}) and "NaN" not in "".join(labels)
    if figures["kl"] is None:
        assert "score" in texts_of(browser, "#curve .name")
    else:
        assert len(labels) >= 4


def test_a_stage_that_is_not_measured_yet_has_a_page(look, tmp_path):
    folder = write_run(tmp_path, 3, total=9)
    run = json.loads((folder / "run.json").read_text()) | {"script": "train_reward_model"}
    (folder / "run.json").write_text(json.dumps(run))
    change_metrics(folder, loss=0.5, eval_loss=None, eval_accuracy=None)
    browser = look(watch.write_page(folder))
    names = ["loss in training", "held-out loss", "held-out accuracy"]
    assert texts_of(browser, "#curve .name") == names
    assert not browser.find_element(By.ID, "comparisons").is_displayed()


def test_each_axis_has_labels_within_the_picture(look, trained):
    browser = look(trained / "watch.html", SMALL_PHONE)
    lefts = "return [...document.querySelectorAll('#curve text')].map("
    lefts += "(text) => text.getBoundingClientRect().left - "
    lefts += "document.getElementById('curve').getBoundingClientRect().left)"
    assert min(browser.execute_script(lefts)) >= 0
    heights = browser.execute_script(
        "return [...document.querySelectorAll('#curve .grid')].map((line) => line.getAttribute('y1'))"
    )
    above = [height for height in heights if float(height) < 200]
    assert len(above) >= 3 and len(heights) - len(above) >= 2


def test_the_slider_stands_below_the_mark_and_goes_to_steps_that_are_kept(look, large):
    browser = look(large)
    kept = [step["step"] for step in page_content(large)["steps"]]
    slider = browser.find_element(By.ID, "slider")
    titles = []
    for key in (Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.HOME, Keys.END):
        slider.send_keys(key)
        (title,) = texts_of(browser, "#step-title")
        titles.append(int(title.rpartition(" ")[2].replace(",", "")))
        assert slider.get_property("value") == str(titles[-1])
    assert titles == [kept[-2], kept[-3], kept[-2], kept[0], kept[-1]]
    set_slider(browser, kept[5] + 1)
    width, left = slider.rect["width"], slider.rect["x"]
    thumb = left + 8 + (width - 16) * kept[5] / kept[-1]
    mark = browser.find_element(By.ID, "mark").rect["x"]
    assert mark == pytest.approx(thumb, abs=2)


def test_where_only_some_beginnings_are_scored_that_is_told_and_marked(look, tmp_path):
    texts = [" a", " b", " happy", " c", "."]
    folder = write_run(tmp_path, 1, texts=texts, places=[0, 1], reward="rewards.py:f")
    rows = read_rows(folder / "samples.jsonl")
    for row in rows:
        row["tokens"]["score"] = [0.0, 0.0, 0.0, 0.0, 2.0]
        row["score"] = 1.0
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser = look(watch.write_page(folder))
    assert texts_of(browser, ".said mark") == ["b happy c."] * 10
    (told,) = texts_of(browser, ".asked-help")
    assert told.startswith("The score was asked at 1 place, the thin line, and at the end: ")
    assert len(browser.find_elements(By.CSS_SELECTOR, ".token:nth-child(1) + .asked")) == 1
    assert len(browser.find_elements(By.CSS_SELECTOR, ".asked")) == 1
    (told,) = texts_of(browser, ".earned-help")
    assert (
        told
        == "An empty text scores \u22121.00; the tokens added +2.00; the response scores +1.00."
    )
    assert "the text so far" not in texts_of(browser, "[data-quantity=score]")[0]
    # The arrow keys pass over the thin line.
    press_on(browser, ".token", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert texts_of(browser, ".which") == ["happy"]


def press_on(browser, selector, *keys):
    """Press keys where the first of these elements has the focus."""
    browser.execute_script("arguments[0].focus()", browser.find_element(By.CSS_SELECTOR, selector))
    press(browser, *keys)


def test_where_only_whole_responses_are_scored_none_is_marked(look, tmp_path):
    folder = write_run(tmp_path, 1, reward="rewards.py:f", score_prefixes=False)
    browser = look(watch.write_page(folder))
    assert texts_of(browser, ".said mark") == []
    (told,) = texts_of(browser, ".earned-help")
    assert told == "The response scores +0.90; the last token gets it all."
    assert texts_of(browser, "#mark-help") == [""]


def test_a_score_that_is_none_is_no_hindrance(look, tmp_path):
    folder = write_run(tmp_path, 1)
    rows = read_rows(folder / "samples.jsonl")
    for row in rows:
        row["tokens"]["score"] = [-1.0, None, -0.5]
    rows[-1]["tokens"] = {name: [] for name in rows[-1]["tokens"]}
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser = look(watch.write_page(folder))
    assert texts_of(browser, ".token") == []  # an empty response has no tokens
    browser.find_elements(By.CSS_SELECTOR, ".opener")[1].click()
    assert texts_of(browser, ".which") == ["."]


def test_scores_on_another_scale_are_told_with_it(look, tmp_path):
    folder = write_run(tmp_path, 2, reward="rewards.py:f")
    change_metrics(folder, score=7477.938, success_rate=None, reward=0.9)
    figures = {"score": 7000.0, "success_rate": None, "kl": 0.5}
    scale = {"mean": 6540.04, "deviation": 943.013, "threshold": None, "accuracy": None}
    report = {"samples": 20, "device": "CPU", "learned": True, "scale": scale}
    report |= {"base": {"train_prompts": figures}, "trained": {"train_prompts": figures}}
    (folder / "report.json").write_text(json.dumps(report))
    path = watch.write_page(folder)
    browser = look(path, SMALL_PHONE)
    rights = "return [...document.querySelectorAll('#curve text')].map("
    rights += "(text) => text.getBoundingClientRect().right)"
    curve = browser.find_element(By.ID, "curve").rect
    assert max(browser.execute_script(rights)) <= curve["x"] + curve["width"]
    (told,) = texts_of(browser, "#scale")
    assert ": 6540 counts as 0, 943 points are about 1, and " in told
    (told,) = texts_of(browser, "#figures-of-step")
    assert "score +7477.94, as trained on +" in told
    (blue,) = texts_of(browser, "#figures-of-step .more-text")
    assert number_in(blue) < 2


def test_the_words_that_count_are_folded_away(look, trained):
    browser = look(trained / "watch.html")
    (summary,) = texts_of(browser, "#rule summary")
    words = json.loads((trained / "run.json").read_text())["settings"]["positive_words"]
    told = f"A response scores +1 if it has one of {len(words)} words, else \u22121."
    assert summary == told
    words_shown = browser.find_element(By.CSS_SELECTOR, "#rule p")
    assert not words_shown.is_displayed()
    browser.find_element(By.CSS_SELECTOR, "#rule summary").click()
    assert words_shown.text == f"One is enough: {', '.join(words)}"


def test_what_is_lacking_in_samples_jsonl_is_told(look, tmp_path):
    folder = write_run(tmp_path, 9)
    path = folder / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:30]))
    browser = look(watch.write_page(folder))
    (told,) = texts_of(browser, "#which-steps")
    assert told == (
        "Of 9 steps, 3 are kept here: 1, 2, 3. In samples.jsonl those after step 3 are missing."
    )
    path.unlink()
    browser = look(watch.write_page(folder))
    assert browser.find_elements(By.CSS_SELECTOR, "#slider-help, #slider") == []


def test_of_many_tokens_the_numbers_stay_in_sight(look, tmp_path):
    browser = look(watch.write_page(write_run(tmp_path, 1, texts=[" happy"] * 300)))
    press_on(browser, ".token", Keys.ARROW_RIGHT)
    (value,) = browser.find_elements(By.CSS_SELECTOR, "[data-quantity=kl] .value")
    bottom = browser.execute_script("return arguments[0].getBoundingClientRect().bottom", value)
    assert 0 < bottom < DESKTOP[1]


def test_without_javascript_a_page_says_so(browser, large):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(large.as_uri())
        assert "JavaScript" in browser.find_element(By.TAG_NAME, "body").text
        assert not browser.find_element(By.ID, "slider").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_numbers_that_are_none_are_shown_as_none(look, tmp_path):
    folder = write_run(tmp_path, 3)
    rows = read_rows(folder / "samples.jsonl")
    for row in rows[-10:]:
        row["kl"] = None
        row["tokens"] |= {"kl": [None, 0.5, None], "value": [None] * 3}
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "samples.jsonl").write_text("".join(lines))
    metrics = read_rows(folder / "metrics.jsonl")
    metrics[-1] |= {"kl": None, "reward": None, "success_rate": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    browser = look(watch.write_page(folder))
    (told,) = texts_of(browser, "#figures-of-step")
    assert "KL \u2013 nats" in told and "NaN" not in told
    (panel,) = texts_of(browser, ".panel")
    assert "NaN" not in panel
    browser.find_element(By.CSS_SELECTOR, "[data-quantity=reward] input").click()
    assert texts_of(browser, ".token .figure") == ["\u2013", "+1.95", "\u2013"]
    assert texts_of(browser, "[data-quantity=reward] .sum") == ["\u2013"]


@pytest.fixture(scope="module")
def stages(run_script, demo_model, tmp_path_factory):
    """Return the folders of a short SFT run and of a reward model, by their scripts."""
    cwd = tmp_path_factory.mktemp("stages")
    pairs, examples = [], []
    for place in range(40):
        prompt = f"I have {place} dogs and feel"
        pair = {"prompt": prompt, "chosen": " happy </script>", "rejected": " <b>sad</b>"}
        pairs.append(json.dumps(pair))
        example = {"instruction": f"Say {place}", "output": f" It is {place} <i>"}
        examples.append(json.dumps(example))
    (cwd / "pairs.jsonl").write_text("\n".join(pairs))
    (cwd / "examples.jsonl").write_text("\n".join(examples))
    flags = ["--model-name", demo_model, "--device", "cpu", "--training-epochs", "2"]
    flags += ["--batch-size", "8", "--eval-every", "3"]
    for script, data in (("train_sft", "examples"), ("train_reward_model", "pairs")):
        places = ["--data", f"{data}.jsonl", "--output-dir", script]
        run = run_script(cwd, *flags, *places, script=ROOT / f"{script}.py")
        assert run.status == 0, run.stderr
    return cwd


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_of_sft_shows_its_answers_and_what_is_learned(look, stages, size):
    folder = stages / "train_sft"
    browser = look(folder / "watch.html", size)
    report = json.loads((folder / "report.json").read_text())
    assert f"{report['trained']['loss']:.2f}" in texts_of(browser, "#headline")[0]
    answers = [*report["base"]["first_sample"].values()]
    assert texts_of(browser, "#answers td:first-child") == [answer.strip() for answer in answers]
    rows = read_rows(folder / "learned.jsonl")
    assert [row["held_out"] for row in rows] == [True] * 4 + [False] * 6
    for row, shown in zip(rows, browser.find_elements(By.CSS_SELECTOR, ".example")):
        assert shown.get_property("textContent") == "".join(row["text"])
        learned = shown.find_elements(By.CSS_SELECTOR, ".learned")
        text = "".join(token.get_property("textContent") for token in learned)
        assert text.startswith(" It is ") and text.endswith(" <i></s>")
    points = browser.find_elements(By.CSS_SELECTOR, "#curve circle")
    assert len(points) == len([r for r in read_metrics(folder) if r["eval_loss"] is not None]) + 2
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_of_a_reward_model_shows_what_it_prefers(look, stages, size):
    folder = stages / "train_reward_model"
    browser = look(folder / "watch.html", size)
    report = json.loads((folder / "report.json").read_text())
    assert f"{100 * report['trained']['accuracy']:.0f} %" in texts_of(browser, "#headline")[0]
    rows = read_rows(folder / "compared.jsonl")
    margins = sorted((row["better_score"] - row["worse_score"] for row in rows), reverse=True)
    assert sum(margins) / len(margins) == pytest.approx(report["trained"]["margin"], rel=1e-3)
    shown = numbers_of(browser, "#compared td.number")
    assert shown == pytest.approx(margins, abs=0.006)
    browser.find_element(By.CSS_SELECTOR, "#compared th button").click()
    assert numbers_of(browser, "#compared td.number") == shown[::-1]
    assert {text for text in texts_of(browser, "#compared td:first-child .said")} == {
        row["better"] for row in rows
    }
    bins = report["trained"]["calibration"]
    assert len(texts_of(browser, "#calibration tbody tr")) == len(bins)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
