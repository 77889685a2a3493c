"""The report in a real browser: headless Chromium."""

import shutil

import pytest

from abs_defense import ABS
from abs_defense.attacks import L2BisectorAttack
from abs_defense.benchmark import CLEAN, AttackSpec, ModelSpec, run_evaluation

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory, digits):
    model = ModelSpec("abs", lambda: ABS(prototypes=100, steps=1), kind="abs")
    attack = AttackSpec("l2-bisector", "l2", {"steps": 4}, factory=L2BisectorAttack)
    folder = tmp_path_factory.mktemp("report")
    return run_evaluation([model], (CLEAN, attack), digits.head(4), folder, progress=False).report


@pytest.fixture(scope="module")
def browser():
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
        yield chrome


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_report_shows_its_figures_without_errors(report, browser, width, height):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(report.as_uri())
    assert browser.title == "abs-defense report"
    sizes = browser.execute_script(
        "return [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(sizes) == 4
    assert all(natural > 100 and shown > 100 for natural, shown in sizes)
    assert browser.get_log("browser") == []
    page, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert page <= window, "the page scrolls sideways"
    texts = browser.find_element("tag name", "body").text
    assert "What is not guaranteed" in texts
    assert "published" in texts
