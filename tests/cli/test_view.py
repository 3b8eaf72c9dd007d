"""The page that `reroute-kernels view` writes: its content, and its appearance in a browser."""

import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import reroute_kernels as rk
from bench.pages.screenshot import NAMES, chromium, find_chromium
from reroute_kernels.boxes import overlap, read_box
from reroute_kernels.cli import demo, view
from reroute_kernels.cli.commands import app
from tests.cli.photos import assert_one_clear_line

QUESTION = (
    "</script><script>document.title = 'broken out'</script> <!-- & \"<b>http://example.com/x.js</b>\" {{data}} é"
)
ANSWER = "At [0.25, 0.30, 0.50, 0.60] <img src=x onerror=alert(1)></script>"
TRUTH = (0.25, 0.3, 0.75, 0.6)
SCHEDULE = "2:0.4,6:0.2,9:0.3"
COLOURS = {"deferred": 'url("#veil")', "removed": 'url("#hatch")', "active": "none", "returned": "none"}


def run(*arguments):
    return CliRunner().invoke(app, ["view", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page as the command line writes it, with its sources. Only the second answer holds a box."""
    folder, found = tmp_path_factory.mktemp("view"), []

    def compare(subject, **settings):
        panes = compare_really(subject, **settings)
        panes[0].answer, panes[0].box = "nowhere", None
        panes[1].answer, panes[1].box = ANSWER, read_box(ANSWER, "llava", subject.picture.size)
        found.append((subject, panes))
        return panes

    with pytest.MonkeyPatch.context() as patch:
        compare_really = view.compare
        patch.setattr(view, "compare", compare)
        result = run(
            *("--prompt", QUESTION, "--policy", f"remove:{SCHEDULE}", "--policy", SCHEDULE, "--max-new-tokens", 4),
            *("--truth", ",".join(map(str, TRUTH)), "--output", folder / "page.html", "--png", folder / "still.png"),
        )
    assert result.exit_code == 0, result.output
    ((subject, panes),) = found
    html = (folder / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
    return SimpleNamespace(result=result, folder=folder, html=html, data=data, subject=subject, panes=panes)


def expected(pane, positions, layer):
    """State of each patch in a layer, and its score there, from the trace."""
    before, ran, scores = set(positions), set(positions), None
    for stage in pane.trace.stages:
        if stage.layer <= layer:
            before, ran, scores = ran, set(stage.selected[0].tolist()), stage.scores[0].tolist()
    rest = "deferred" if pane.policy.action == "reroute" else "removed"
    states = [rest if position not in ran else "active" if position in before else "returned" for position in positions]
    return states, scores


# Without a browser


def test_data_are_what_the_traces_say(made):
    positions, data = made.subject.visual_positions(), made.data
    assert (data["layers"], data["grid"], data["size"]) == (16, [12, 12], [192, 192])
    seen = set()
    for pane, shown in zip(made.panes, data["panes"], strict=True):
        assert (shown["name"], shown["action"], shown["answer"]) == (pane.name, pane.policy.action, pane.answer)
        for layer in range(16):
            stage = [stage for stage in shown["stages"] if stage["layer"] <= layer][-1]
            letters = {"a": "active", "r": "returned", "d": "deferred", "x": "removed"}
            states, scores = expected(pane, positions, layer)
            assert [letters[letter] for letter in stage["states"]] == states
            seen |= {(pane.policy.action, state) for state in states}
            assert stage["decision"] == (scores is not None)
            if scores is None:
                assert stage["scores"] is None
                continue
            given = torch.tensor([torch.nan if score is None else score for score in stage["scores"]])
            torch.testing.assert_close(given, torch.tensor(scores), atol=0, rtol=0, equal_nan=True)
    assert seen == {
        *(("reroute", state) for state in ("active", "returned", "deferred")),
        *(("remove", state) for state in ("active", "removed")),
    }


def test_default_scene_is_neither_dark_nor_white(made):
    """A veil over it is seen."""
    assert 96 <= np.asarray(made.subject.picture).mean() <= 160


def test_boxes(made):
    removed, rerouted = made.data["panes"]
    assert made.data["truth"] == list(TRUTH)
    assert (removed["box"], removed["overlap"]) == (None, None)
    assert rerouted["box"] == [0.25, 0.3, 0.5, 0.6]
    assert rerouted["overlap"] == pytest.approx(0.5)
    assert overlap((0, 0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75)) == pytest.approx(1 / 7)
    assert overlap((0, 0, 0.5, 0.5), (0.5, 0.6, 0.75, 0.75)) == 0


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_page_needs_nothing_else(made):
    elements = Elements(made.html).found
    links = [
        value for _, attributes in elements for name, value in attributes.items() if name in ("src", "href", "action")
    ]
    assert all(link.startswith("data:") for link in links)
    assert made.data["image"].startswith("data:image/png;base64,")
    template = view.TEMPLATE.read_text()
    assert "http:" not in template
    assert "https:" not in template
    assert "@import" not in template
    assert set(re.findall(r"url\((.*?)\)", template)) == {"#hatch", "#veil"}


def test_text_stays_text(made):
    assert made.data["question"] == QUESTION
    names = [tag for tag, _ in Elements(made.html).found]
    assert names == [tag for tag, _ in Elements(view.TEMPLATE.read_text()).found]
    data = re.search(r'id="data">(.*)', made.html)[1].removesuffix("</script>")
    assert not set("<>&") & set(data)


def test_table_and_still(made):
    assert "[0.25, 0.30" in made.result.output.replace("\n", " ")
    assert "0.25, 0.30, 0.50, 0.60" in made.result.output
    assert str(made.folder / "page.html") in made.result.output
    with Image.open(made.folder / "still.png") as image:
        assert image.format == "PNG"
        assert image.width > image.height > 700  # two rows of four
        colours = [colour for _, colour in image.convert("RGB").getcolors(2**24)]
    for drawn in ((255, 43, 214), (255, 214, 10), (0, 180, 240), (201, 203, 209)):  # thin lines are blended
        assert min(sum(abs(one - other) for one, other in zip(drawn, each, strict=True)) for each in colours) < 40


def test_what_a_reducer_drops_is_gone_from_the_start(tiny_llava):
    photo = demo.open_image(None)
    subject = demo.load(tiny_llava, photo, "What?", ["reroute-nuwa/64"], chat=None, device="cpu", dtype="float32")
    pane = view.compare(subject, max_new_tokens=1)[1]
    assert pane.name == "llava-1.5-7b/reroute-nuwa/64"
    positions = subject.visual_positions()
    left = set(pane.trace.reduction.selected[0].tolist())
    first, second, *_ = view.stages_of(pane.trace, positions)
    gone = {place for place, position in enumerate(positions) if position not in left}
    assert gone
    for stage in (first, second):
        assert {place for place, letter in enumerate(stage["states"]) if letter == view.REMOVED} == gone
    assert {place for place, score in enumerate(second["scores"]) if score is None} == gone
    assert (first["decision"], first["scores"]) == (False, None)
    assert view.DEFERRED in second["states"]


def test_merged_patches_are_marked(tmp_path):
    """Tokens whose features are not the tower's own."""
    page, still = tmp_path / "page.html", tmp_path / "still.png"
    policies = ("--policy", "nuwa.json", "--policy", "3:0.5")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        rk.Policy((), reducer=rk.reducers.Nuwa(keep=0.25, per_cell=1)).save("nuwa.json")
        result = run(*policies, "--max-new-tokens", 1, "--output", page, "--png", still)
    assert result.exit_code == 0, result.output
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])
    reduced, plain = data["panes"]
    assert plain["merged"] == []
    kept = {place for place, letter in enumerate(reduced["stages"][0]["states"]) if letter == view.ACTIVE}
    assert len(kept) == 36
    assert 0 < len(reduced["merged"]) < 36  # the most salient ones stay as they are
    assert set(reduced["merged"]) <= kept
    assert reduced["merged"] == sorted(reduced["merged"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "nonsense"), "policy must be a preset like .* got 'nonsense'"),
        (("--policy", "2:.5", "--policy", "2:1.5"), r"got '2:1.5': keep must be in \(0, 1\], got 1.5 at layer 2"),
        (("--policy", "2:.5") * 3, "policy must be given once or twice, got 3: 2:.5 2:.5 2:.5"),
        (("--policy", "40:0.5"), "schedule must stay below layer 16 .* got layer 40"),
        (("--truth", "1,2"), "truth must be left,top,right,bottom, shares from 0 to 1 such as .*, got '1,2'"),
        (("--truth", "0.5,0.2,0.4,0.3"), "truth must be left,top,right,bottom.* got '0.5,0.2,0.4,0.3'"),
        (("--truth", "0,0,1,1.1"), "truth must be .* got '0,0,1,1.1'"),
        (("--output", "page.txt"), "output must end in .html, got page.txt"),
        (("--output", "missing/page.html"), "output must be a file that can be written"),
        (("--png", "still.txt"), "png must end in one of .png"),
        (("--image", "missing.jpg"), "image must be an existing file, got missing.jpg"),
        (("--prompt", "<image> and <image>"), "prompt must hold the image token '<image>' once"),
        (("--model", "missing"), "model must be a checkpoint folder or hub id of a supported type"),
        (("--dtype", "int8"), "dtype must be float32, float16 or bfloat16, got 'int8'"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_one_clear_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--max-new-tokens", 1, *arguments)
    assert_one_clear_line(result, message)
    assert not list(tmp_path.iterdir())


def test_policy_that_refuses_the_prompt(tiny_llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--model", tiny_llava, "--policy", "nuwa/64", "--prompt", "USER: <image>")
    assert result.exit_code == 2
    assert "reroute-kernels: input_ids must end with text where there is a reducer" in result.stderr
    assert not list(tmp_path.iterdir())


# In a browser


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api", reason="needs playwright, as in requirements/dev.txt")
    if find_chromium() is None:
        pytest.skip(f"needs Chromium (make browser): found none of {', '.join(NAMES)}")
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser, made):
    """Opens the page in a window of a width, without a network; checks at the end for requests and errors."""
    contexts, failures, requests = [], [], []

    def opening(width=1200, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **settings)
        context.set_default_timeout(120_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: failures.append(message.text))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((made.folder / "page.html").as_uri())
        return page

    yield opening
    for context in contexts:
        context.close()
    assert not failures
    assert [url for url in requests if not url.startswith("data:")] == [(made.folder / "page.html").as_uri()]


def shown(page):
    """For each pane the classes and the fill of every patch, its counts, and its texts."""
    return page.evaluate("""() => [...document.querySelectorAll("section")].map(section => ({
        classes: [...section.querySelectorAll(".cell")].map(cell => [...cell.classList]),
        fills: [...section.querySelectorAll(".fill")].map(each => getComputedStyle(each).fill),
        frames: [...section.querySelectorAll(".frame")].map(each => getComputedStyle(each).stroke),
        titles: [...section.querySelectorAll(".cell title")].map(each => each.textContent),
        counts: Object.fromEntries([...section.querySelectorAll("dd")].map(dd => [dd.dataset.count, dd.textContent])),
        label: section.querySelector("svg").getAttribute("aria-label"),
        top: section.getBoundingClientRect().top,
    }))""")


def check_states(page, made, layer):
    positions = made.subject.visual_positions()
    assert page.text_content("#number") == f"{layer} of 0 to 15"
    for pane, drawn in zip(made.panes, shown(page), strict=True):
        states, _ = expected(pane, positions, layer)
        assert [each[1] for each in drawn["classes"]] == states
        assert drawn["fills"] == [COLOURS[state] for state in states]
        assert drawn["frames"] == ["rgb(255, 43, 214)" if state == "returned" else "none" for state in states]
        counts = {state: states.count(state) for state in ("returned", "deferred", "removed")}
        counts["active"] = states.count("active") + counts["returned"]
        assert drawn["counts"] == {state: f"{count:,}" for state, count in counts.items()}
        assert drawn["label"].startswith(f"{pane.policy.action} in layer {layer}: {counts['active']} active")


def test_slider_shows_what_the_data_say(opened, made):
    page = opened()
    check_states(page, made, 6)  # the second decision
    for layer in (0, 1, 2, 5, 8, 9, 15):
        page.fill("#layer", str(layer))
        check_states(page, made, layer)
    assert page.get_attribute("#layer", "max") == "15"


def test_keyboard(opened, made):
    page = opened()
    slider = page.get_by_label("Decoder layer")
    slider.focus()
    for key, layer in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 15)):
        page.keyboard.press(key)
        check_states(page, made, layer)
    assert slider.get_attribute("aria-valuetext").startswith("layer 15; remove: ")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("[value=score]")


def test_scores(opened, made):
    page = opened()
    positions = made.subject.visual_positions()
    page.get_by_label("scores of the decision").check()
    for layer in (6, 12):
        page.fill("#layer", str(layer))
        for pane, drawn in zip(made.panes, shown(page), strict=True):
            states, scores = expected(pane, positions, layer)
            scores = torch.tensor(scores)
            candidates = ~scores.isnan()
            assert [("candidate" in each) for each in drawn["classes"]] == candidates.tolist()
            assert [("other" in each) for each in drawn["classes"]] == (~candidates).tolist()
            runs = [state in ("active", "returned") for state in states]
            assert [("chosen" in each) for each in drawn["classes"]] == runs
            order = scores.nan_to_num(-torch.inf).argsort(descending=True, stable=True)[: candidates.sum()].tolist()
            assert drawn["fills"][order[0]] == "rgb(253, 231, 37)"
            assert drawn["fills"][order[-1]] == "rgb(68, 1, 84)"
            assert {drawn["fills"][place] for place in (~candidates).nonzero().flatten()} <= {'url("#hatch")'}
            assert re.search(rf"score [\d.e-]+, rank 1 of {len(order)}$", drawn["titles"][order[0]])
            frames = {drawn["frames"][place] for place, state in enumerate(states) if state in ("deferred", "removed")}
            assert frames == {"none"}
    page.fill("#layer", "1")
    assert all(set(drawn["fills"]) == {"none"} for drawn in shown(page))
    page.get_by_label("patches that run").check()
    check_states(page, made, 1)


def test_texts_and_boxes(opened, made):
    page = opened()
    assert page.title() == "Which patches run in every layer"
    label, title = page.text_content("header p"), page.text_content("h1")
    assert (label, title) == ("Question", QUESTION)
    assert page.locator("header p b").all_text_contents()[1:] == ["remove", "reroute"]  # a sentence on each
    assert page.text_content("#unrouted") == made.data["unrouted"] != ""
    assert page.locator("section .answer").all_text_contents() == [pane.answer for pane in made.panes]
    assert page.locator("section h2").all_text_contents() == [f"remove: {SCHEDULE}", f"reroute: {SCHEDULE}"]
    assert page.locator(".overlap").all_text_contents()[1].endswith("by 0.50 (IoU)")
    edges = page.evaluate("""() => [...document.querySelectorAll("section")].map(section => ["read", "true"].map(kind =>
        [...section.querySelectorAll(`.box.${kind}`)].map(box => ["x", "y", "width", "height"].map(name =>
            Number(box.getAttribute(name))))))""")
    true = [pytest.approx([192 * share for share in (0.25, 0.3, 0.5, 0.3)])]
    assert edges == [[[], true], [[pytest.approx([192 * share for share in (0.25, 0.3, 0.25, 0.3)])], true]]
    assert page.evaluate("document.querySelectorAll('img, section script').length") == 0


@pytest.mark.parametrize(("width", "beside"), [(1200, True), (420, False), (390, False)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layout(opened, width, beside, scheme):
    page = opened(width, color_scheme=scheme)
    first, second = shown(page)
    assert (first["top"] == second["top"]) == beside
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    channels = page.evaluate("""() => [getComputedStyle(document.body).color,
        getComputedStyle(document.body).backgroundColor]""")
    ink, paper = (sum(map(int, re.findall(r"\d+", channel))) for channel in channels)
    assert (ink < paper) == (scheme == "light")
    assert abs(ink - paper) > 400


def pixels_of(locator):
    """(height, width, 3) of what the browser draws, in float."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"), dtype=float)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_states_look_different(opened, made, scheme):
    """Over the picture itself: a deferred patch is no active one, and its picture is still seen; a removed one is not.

    In the legends no swatch is empty.
    """
    page = opened(color_scheme=scheme)
    page.add_style_tag(content=".box, .frame { display: none }")
    pictures = page.locator("section .picture")

    def patches(pane, layer):
        page.fill("#layer", str(layer))
        whole = Image.fromarray(pixels_of(pictures.nth(pane)).astype(np.uint8)).resize((384, 384))
        return np.asarray(whole, dtype=float).reshape(12, 32, 12, 32, 3).swapaxes(1, 2).reshape(144, 32, 32, 3)

    for pane, state in ((0, "removed"), (1, "deferred")):
        plain, drawn = patches(pane, 0), patches(pane, 2)
        states, _ = expected(made.panes[pane], made.subject.visual_positions(), 2)
        changed = np.abs(drawn - plain).mean((1, 2, 3))
        those = np.array([each == state for each in states])
        assert changed[those].min() > 15
        assert changed[~those].max() < 8  # edges are blended
        means, before = (each[those].mean((1, 2, 3)) for each in (drawn, plain))
        seen = means.std() / before.std()
        assert (0.3 < seen < 0.7) if state == "deferred" else seen < 0.1

    paper = page.locator("aside").evaluate("each => getComputedStyle(each).backgroundColor")
    paper = np.array(re.findall(r"\d+", paper), dtype=float)
    for overlay in ("state", "score"):
        page.check(f"[value={overlay}]")
        swatches = page.locator(".legend .swatch:visible")
        assert swatches.count() == {"state": 6, "score": 5}[overlay]
        for swatch in swatches.all():
            inked = np.abs(pixels_of(swatch) - paper).mean(2) > 30
            assert inked.mean() > 0.35
