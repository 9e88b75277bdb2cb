"""The HTML report: safe text, no network, and driven in a real browser (Debian's chromium, which CI installs)."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_clips import VIDEO_ID, store_clip
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver

from wan_common import attention_report
from wan_common.attention_maps import AttentionAnalyzer
from wan_common.attention_report import _atlas, build_report
from wan_common.attention_visualizer import AttentionVisualizer, robust_range

HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror="document.title=1"> & "quotes" {{ 7 * 7 }}'
WORDS = ["left", "right", "<b>bold</b>", "红色"]
SIZE, FRAMES, STEPS = (320, 192), 9, 4
BASE = 0.01


def weight(word: int, step: int, frame: int) -> np.ndarray:
    """``left`` is hot at the left edge, ``right`` at the right; hotter with each step, lower down with each latent frame."""
    values = np.full((12, 20), BASE)
    if word < 2:
        values[4 * frame : 4 * frame + 3, slice(0, 4) if word == 0 else slice(16, 20)] = 0.05 * (step + 1)
    return values


def make_report(root: Path, *, video: bool = True, negative: bool = True, **options: Any) -> Path:
    store_clip(root, WORDS, size=SIZE, frames=FRAMES, steps=STEPS, weight=weight, prompt=HOSTILE, video=video)
    if negative:
        store_clip(root, ["blurry"], size=SIZE, frames=FRAMES, steps=STEPS, video=False, video_id=VIDEO_ID + "_negative", prompt="blurry")
    visualizer = AttentionVisualizer(AttentionAnalyzer(root / "attention_maps"), progress=False, **options)
    return build_report(
        visualizer, VIDEO_ID, root / "attention_report.html", original=root / "output_video.mp4" if video else None,
        negative_id=VIDEO_ID + "_negative" if negative else None,
    )  # fmt: skip


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


# ------------------------------------------------------------------------------------------------------------ without browser


def test_text_is_text_and_nothing_points_outside(tmp_path: Path) -> None:
    page = make_report(tmp_path).read_text()
    assert "<script>document" not in page and "<img src=x" not in page and "<b>bold" not in page
    assert html.escape(HOSTILE, quote=False) in html.unescape(page).replace(HOSTILE, html.escape(HOSTILE, quote=False))
    assert "{{ 7 * 7 }}" in page and ">49<" not in page
    assert len(re.findall(r"<script\b", page)) == 2 and len(re.findall(r"</script>", page)) == 2
    assert "default-src 'none'" in page
    outside = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"base64,[A-Za-z0-9+/=]+|\"[A-Za-z0-9+/=]{60,}\"", "", page))
    assert [address for address in outside if "www.w3.org" not in address] == []  # the name of the SVG namespace is no request


def test_maps_survive_the_page(tmp_path: Path) -> None:
    data = embedded(make_report(tmp_path).read_text())
    clip = data["clips"][0]
    assert clip["grid"] == [3, 12, 20] and clip["steps"] == [0, 1, 2, 3] and len(data["frames"]) == FRAMES
    assert [group["name"] for group in clip["groups"]] == [*WORDS, "_other", "_eos", "_pad"]
    for step in range(STEPS):
        entry = clip["maps"][0][step]
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["png"]))))
        for frame in range(3):
            y, x = frame // clip["columns"] * 12, frame % clip["columns"] * 20
            values = entry["low"] + sheet[y : y + 12, x : x + 20] / 255 * (entry["high"] - entry["low"])
            np.testing.assert_allclose(values, weight(0, step, frame), atol=0.002)  # 1/255 of the largest, 0.2


def test_atlas_keeps_every_frame_in_its_place() -> None:
    values = np.random.default_rng(0).random((7, 5, 9)).astype(np.float32)
    entry, columns = _atlas(values)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["png"])))) / 255 * (entry["high"] - entry["low"]) + entry["low"]
    for frame in range(7):
        y, x = frame // columns * 5, frame % columns * 9
        np.testing.assert_allclose(sheet[y : y + 5, x : x + 9], values[frame], atol=1 / 255)


def test_too_many_steps_are_thinned_evenly_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_report, "MAP_BYTES", 3 * 12 * 20 * (8 + 5) * 2)  # room for two steps of both prompts
    data = embedded(make_report(tmp_path).read_text())
    assert data["clips"][0]["steps"] == [0, 3] and len(data["clips"][0]["maps"][0]) == 3
    assert "2 of 4 steps shown" in caplog.text


def test_long_videos_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_report, "FRAME_COUNT", 5)
    data = embedded(make_report(tmp_path, negative=False).read_text())
    assert (len(data["frames"]), data["video"]["stride"], data["video"]["count"]) == (5, 2, 9)


def test_without_a_video_the_page_says_how_to_get_it(tmp_path: Path) -> None:
    page = make_report(tmp_path, video=False).read_text()
    assert "stage3_vae_decoder.py" in page and embedded(page)["frames"] == []


# --------------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,1400",
            f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        try:
            driver.get("about:blank")
            driver.set_network_conditions(offline=True, latency=0, throughput=0)
            yield driver
        finally:
            driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_report(tmp_path_factory.mktemp("report"))


class Page:
    """The open report: what a reader does, and the pixels they see."""

    def __init__(self, driver: WebDriver, path: Path):
        self.driver = driver
        for kind in ("browser", "performance"):
            driver.get_log(kind)  # drop what the start page left
        driver.get(path.as_uri())
        self.wait(lambda: self.drawn() > 0)

    def drawn(self) -> int:
        return int(self.driver.execute_script("return document.body.dataset.drawn || 0"))

    def wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not done():
            assert time.monotonic() < deadline, f"the page did not draw; console: {self.driver.get_log('browser')}"
            time.sleep(0.02)

    def act(self, script: str, *arguments: object) -> None:
        before = self.drawn()
        self.driver.execute_script(script, *arguments)
        self.wait(lambda: self.drawn() > before)

    def slide(self, name: str, value: float) -> None:
        self.act(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))", name, value
        )

    def choose(self, name: str, value: str) -> None:
        self.act(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('change'))", name, value
        )

    def chip(self, name: str) -> None:
        self.act("[...document.querySelectorAll('.chip')].find((c) => c.textContent === arguments[0]).click()", name)

    def panels(self) -> list[str]:
        return self.driver.execute_script("return [...document.querySelectorAll('.panel strong')].map((e) => e.textContent)")

    def pixels(self, panel: int = 0) -> np.ndarray:
        url = self.driver.execute_script("return document.querySelectorAll('.panel > canvas')[arguments[0]].toDataURL('image/png')", panel)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).astype(int)

    def text(self, name: str) -> str:
        return self.driver.execute_script("return document.getElementById(arguments[0]).textContent", name)

    def problems(self) -> list[Any]:
        """Console messages, failed requests, and requests to anywhere but the file and its own data."""
        found: list[Any] = [entry for entry in self.driver.get_log("browser") if entry["level"] != "DEBUG"]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.loadingFailed":
                found.append(message)
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("data:", "file:")):
                    found.append(url)
        return found


@pytest.fixture
def page(browser: WebDriver, report: Path) -> Page:
    return Page(browser, report)


def hot_centre(pixels: np.ndarray) -> tuple[float, float]:
    """Row and column (0..1) of what is far from the clip's gray."""
    hot = np.argwhere(np.abs(pixels - 90).max(axis=2) > 60)
    assert hot.size, "nothing is hot"
    return tuple(hot.mean(axis=0) / pixels.shape[:2])


def test_opens_offline_without_errors_and_shows_the_video(page: Page) -> None:
    assert page.driver.execute_script("return navigator.onLine") is False
    assert page.driver.title == f"Attention: {VIDEO_ID}"  # the prompt's script did not run
    assert page.text("prompt") == HOSTILE
    assert page.panels() == ["left"]
    pixels = page.pixels()
    assert pixels.shape == (192, 320, 3)
    np.testing.assert_allclose(np.median(pixels, axis=(0, 1)), 90, atol=4)  # the clip is gray 90
    row, column = hot_centre(pixels)
    assert column == pytest.approx(2 / 20, abs=0.03) and row == pytest.approx(1.5 / 12, abs=0.04)
    assert page.problems() == []


def test_starts_with_the_strongest_word(browser: WebDriver, tmp_path: Path) -> None:
    store_clip(tmp_path, ["weak", "strong"], steps=1, weight=lambda word, step, frame: (0.01, 0.1)[word])
    visualizer = AttentionVisualizer(AttentionAnalyzer(tmp_path / "attention_maps"), progress=False)
    page = Page(browser, build_report(visualizer, VIDEO_ID, tmp_path / "one_step.html", original=tmp_path / "output_video.mp4"))
    assert page.panels() == ["strong"] and page.problems() == []


def test_chips_choose_words_side_by_side(page: Page) -> None:
    page.chip("right")
    assert page.panels() == ["left", "right"]
    assert hot_centre(page.pixels(0))[1] < 0.2 and hot_centre(page.pixels(1))[1] > 0.8
    page.chip("left")
    assert page.panels() == ["right"]
    page.chip("right")
    assert page.panels() == ["right"]  # the last one stays
    for name in ("<b>bold</b>", "红色", "_pad", "left"):
        page.chip(name)
    assert page.panels() == ["<b>bold</b>", "红色", "_pad", "left"]  # at most four
    assert page.problems() == []


def test_negative_prompt_beside_the_prompt(page: Page) -> None:
    page.chip("blurry")
    captions = page.driver.execute_script("return [...document.querySelectorAll('.panel figcaption')].map((e) => e.textContent)")
    assert page.panels() == ["left", "blurry"] and "(negative prompt)" in captions[1]


def test_frame_slider_follows_the_latent_frames(page: Page) -> None:
    rows = {}
    for frame, latent in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
        page.slide("frame", frame)
        rows[frame] = hot_centre(page.pixels())[0]
        assert rows[frame] == pytest.approx((4 * latent + 1.5) / 12, abs=0.04), frame
        assert page.text("frame-out").startswith(f"{frame} of 8")


def test_step_slider_changes_the_weight(page: Page) -> None:
    brightness = []
    for step in range(STEPS):
        page.slide("step", step)
        assert page.text("step-out").startswith(f"{step} of 3")
        brightness.append(page.pixels()[8:40, 4:56].mean())
    assert brightness == sorted(brightness) and brightness[-1] > brightness[0] + 40
    page.act("document.getElementById('mean').click()")
    assert page.text("step-out") == "mean of 4 steps"


def test_opacity_slider(page: Page) -> None:
    page.slide("opacity", 0)
    assert np.abs(page.pixels() - 90).max() < 8
    page.slide("opacity", 1)
    assert page.pixels()[20, 30].min() > 240  # the hottest colour of the map, white


def test_choices_of_view_colours_and_weights(page: Page) -> None:
    start = page.pixels()
    page.choose("view", "map")
    alone = page.pixels()
    assert alone[150, 160].max() < 90 < start[150, 160].max() + 5  # no video under it
    page.choose("colormap", "viridis")
    assert np.abs(page.pixels() - alone).max() > 100
    page.choose("normalize", "none")
    dark = page.pixels()
    page.choose("over", "real")  # pads and EOS have 0.6: weights over real words are 2.5 times larger
    assert np.abs(page.pixels() - dark).max() > 20
    notes = page.driver.execute_script("return document.querySelector('.panel .scale').textContent")
    assert notes == "01.00"
    assert page.problems() == []


def test_ranges_agree_with_the_videos(page: Page) -> None:
    page.choose("normalize", "frame")
    shown = page.driver.execute_script("return [...document.querySelectorAll('.panel .scale span')].map((e) => Number(e.textContent))")
    limits = robust_range(np.mean([weight(0, step, 0) for step in range(STEPS)], axis=0))
    np.testing.assert_allclose(shown, (limits.low, limits.high), rtol=0.02)


def test_it_plays(page: Page) -> None:
    before = page.drawn()
    page.act("document.getElementById('play').click()")
    page.wait(lambda: page.drawn() > before + 4)
    page.driver.execute_script("document.getElementById('play').click()")
    assert page.problems() == []


def test_keyboard_and_clicks_on_the_curves(page: Page) -> None:
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))"
    press = press.replace("document.dispatch", "document.body.dispatch").replace("{key", "{bubbles: true, key")
    page.act(press, "ArrowRight")
    assert page.text("frame-out").startswith("1 of 8")
    page.act(press, "ArrowDown")
    assert page.text("step-out").startswith("3 of 3")
    page.act(
        "const s = document.querySelector('#chart-mass svg'), b = s.getBoundingClientRect();"
        "s.dispatchEvent(new MouseEvent('click', {clientX: b.left + b.width * 0.1, clientY: b.top + 20, bubbles: true}))"
    )
    assert page.text("step-out").startswith("0 of 3")
    assert page.driver.execute_script("return document.querySelectorAll('#chart-mass polyline').length") == len(WORDS)


def test_tables_hold_the_numbers(page: Page) -> None:
    rows = page.driver.execute_script(
        "return [...document.querySelectorAll('tbody tr')].map((r) => [...r.children].map((c) => c.textContent))"
    )
    table = {row[0]: row for row in rows}
    assert float(table["left"][1]) == pytest.approx(np.mean([weight(0, s, f) for s in range(STEPS) for f in range(3)]), abs=1e-5)
    assert table["left"][4] == "3" and "<b>bold</b>" in table


def test_a_report_without_video_opens_too(browser: WebDriver, tmp_path: Path) -> None:
    page = Page(browser, make_report(tmp_path, video=False, negative=False))
    assert page.driver.execute_script("return document.getElementById('view').disabled") is True
    pixels = page.pixels()
    assert pixels[20, 30].min() > 200 and pixels[150, 160].max() < 60  # the map alone
    assert page.problems() == []
