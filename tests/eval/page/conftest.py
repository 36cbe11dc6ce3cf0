"""A report of everything that a page can show, and a real browser to open it in."""

import shutil

import numpy as np
import pytest
import skimage.data
from PIL import Image

from eval.metrics import METRICS
from eval.pictures import error_map
from eval.report import write_report
from eval.results import (
    Check,
    Comparison,
    Evaluation,
    Interval,
    PhotoResult,
    PhotoSize,
    Plot,
    ReconPictures,
    Reject,
    Row,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
EVIL = '<img src=x onerror="window.hacked=1">'


@pytest.fixture(scope="session")
def evil():
    """The name of a row, which is code."""
    return EVIL


@pytest.fixture(scope="session")
def evaluation():
    """Three photos, three rows, everything that a page can show; the second row's name is code."""
    originals = {
        "cat": Image.fromarray(skimage.data.chelsea()).resize((96, 64)),
        "a/very/long/name/of/a/photo/in/some/folder.png": Image.fromarray(skimage.data.astronaut()).resize((64, 64)),
        "unseen": Image.fromarray(skimage.data.coffee()).resize((96, 64)),
    }
    psnrs_db = {"A": (30.25, 9.5, 27.0), EVIL: (28.0, 26.5, 31.0), "average": (-1.0, float("inf"), -2.0)}
    rows = []
    for name, values in psnrs_db.items():
        photos = [
            PhotoResult(name=photo, metrics={"psnr_db": value}, latent_shape=None, latents=None)
            for photo, value in zip(originals, values, strict=True)
        ]
        mean = float(np.mean(values))
        interval = Interval(value=mean, low=mean - 1, high=mean + 1)
        rows.append(
            Row(
                name=name,
                kind="vae",
                means={"psnr_db": mean},
                intervals={"psnr_db": interval},
                bits_per_pixel=1.5,
                latents=None,
                photos=tuple(photos),
            )
        )
    pictures = {}
    for photo in list(originals)[:2]:
        x = originals[photo]
        blurs = {name: x.resize((8 * n, 8 * n)).resize(x.size) for n, name in enumerate(psnrs_db, start=1)}
        pictures[photo] = {
            name: ReconPictures(
                original=x, recon=blur, error=error_map(blur, x), latent_channels=None, latent_colours=None
            )
            for name, blur in blurs.items()
        }
    difference = Interval(value=1.0, low=0.5, high=1.5)
    return Evaluation(
        size=None,
        metrics={"psnr_db": METRICS["psnr_db"]},
        photos=tuple(PhotoSize(name=name, width=x.width, height=x.height) for name, x in originals.items()),
        rows=tuple(rows),
        pictures=pictures,
        protocol={"Name": "native", "Data": "sha256 " + 64 * "0"},
        comparisons=(
            Comparison(row="A", against=EVIL, metric="psnr_db", difference=difference, verdict="better"),
            Comparison(row="A", against="average", metric="psnr_db", difference=difference, verdict="worse"),
        ),
        plots=(Plot(title="Trips", x_label="trips", metric="psnr_db", lines={"A": ((1, 30.0), (2, 28.0))}),),
        checks=(Check(title="Tiled", row="A", facts={"Bound": "1e-5"}, passed=False),),
        rejects=(Reject(name="broken.png", reason="the file ends early."),),
    )


@pytest.fixture(scope="session")
def browser():
    """Chromium, or a skip that says what is missing."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install 'sd-vae[test]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def url(evaluation, tmp_path_factory):
    """The report as a file URL."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, evaluation, title="A page", curves={"loss": [(0, 1.0), (9, 0.5)]}, provenance={"Seed": "0"})
    return (folder / "report.html").as_uri()


@pytest.fixture
def visit(browser, url):
    """Open the page; `page.requests` and `page.problems` fill as they come."""
    contexts = []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.requests, page.problems = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
