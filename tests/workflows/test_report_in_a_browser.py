"""Reports in a real browser: nothing is loaded, nothing fails, every figure is drawn, at both widths, light and dark."""

import shutil
from pathlib import Path

import pytest
from workflows.test_report_of_trainings import STEPS, folder_of, ladder, lines, searched

from sslvision.workflows.finetuning import finetune
from sslvision.workflows.report_settings import Report
from sslvision.workflows.reporting import report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OLD_RUNS = Path(__file__).parents[1] / "golden" / "old_runs"
# Every path of every figure that is shown has a length and a stroke or a fill.
UNDRAWN = """
return [...document.querySelectorAll("figure svg path")].filter(path => {
  const style = getComputedStyle(path);
  return !path.closest("[hidden]") && (!(path.getTotalLength() > 0) || (style.stroke === "none" && style.fill === "none"));
}).map(path => path.outerHTML.slice(0, 80));
"""
BROKEN_IMAGES = "return [...document.images].filter(image => !image.complete || !image.naturalWidth).length;"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


@pytest.fixture(scope="module")
def browser():
    """Return a headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def reports(run_tiny, settings_of, tmp_path_factory):
    """Return the files of reports of every kind."""
    runs = tmp_path_factory.mktemp("runs")
    run_tiny(runs / "mae")
    run_tiny(runs / "dino", recipe="dino")
    words = [f"run={runs / 'mae'}", "data=digits", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    finetune(settings_of("finetune", *words, "epochs=0", "min_updates=4", "evaluations=2"), runs / "tuned")
    report(Report(run=[str(OLD_RUNS / "mae")], output=str(runs / "stopped.html")))
    report(Report(run=[str(runs / "mae"), str(runs / "dino"), str(runs / "tuned")], output=str(runs / "three.html")))
    steps = {"steps.jsonl": lines(STEPS), "results.json": {"best": None, "objective": "k-NN top-1", "unit": " %"}}
    folder_of(runs / "steps", {"search": None, "trial_epochs": None}, steps)
    searched(runs / "search")
    ladder(runs / "ladder")
    for name in ("steps", "search", "ladder"):
        report(Report(run=[str(runs / name)]))
    return [
        *(runs / name / "report.html" for name in ("mae", "dino", "tuned", "steps", "search", "ladder")),
        runs / "stopped.html",
        runs / "three.html",
    ]


def show(browser, file, *, width, dark=False):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(file.as_uri())


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, False), (390, True)])
def test_reports_are_drawn_whole_without_an_error_or_a_request(browser, reports, width, dark):
    for file in reports:
        show(browser, file, width=width, dark=dark)
        assert browser.execute_script(UNDRAWN) == []
        assert browser.execute_script("return document.querySelectorAll('figure svg path').length") > 3
        assert browser.execute_script(BROKEN_IMAGES) == 0
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background.removeprefix("rgb(").rstrip(")").split(","))) < 380) == dark
        assert browser.get_log("browser") == []
        asked = [
            entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]
        ]
        assert not [message for message in asked if '"url":"http' in message]
        assert file.stat().st_size < 5_000_000


def test_pointing_at_a_curve_and_at_the_map_shows_what_is_there(browser, reports):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    show(browser, reports[0], width=1440)
    plot = browser.find_element(By.CSS_SELECTOR, "figure.chart .plot")
    ActionChains(browser).move_to_element(plot).perform()
    assert "training loss: " in plot.find_element(By.CSS_SELECTOR, ".tip").text
    space = browser.find_element(By.CSS_SELECTOR, ".map .space")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", space)
    x, y = browser.execute_script(
        "const map = document.querySelector('.map'), data = JSON.parse(map.dataset.map), box = map.querySelector('.space');"
        "const [a, b] = data.layouts[0][7];"
        "return [(a / 1000 - .5) * box.clientWidth, (b / data.height - .5) * box.clientHeight];"
    )
    ActionChains(browser).move_to_element_with_offset(space, round(x), round(y)).perform()
    tip = space.find_element(By.CSS_SELECTOR, ".tip")
    assert tip.is_displayed()
    assert tip.text
    assert "data:image/jpeg" in tip.find_element(By.CSS_SELECTOR, ".thumb").value_of_css_property("background-image")
    browser.find_element(By.XPATH, "//figure[contains(@class,'map')]//button[text()='PCA']").click()
    assert browser.execute_script(
        "return [...document.querySelectorAll('.map g')].map(g => g.hasAttribute('hidden'))"
    ) == [
        True,
        False,
    ]


def test_a_printed_report_has_its_figures_on_white_and_its_folded_parts(browser, reports):
    show(browser, reports[0], width=1440, dark=True)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return [...document.querySelectorAll('details')].every(one => one.open)")
