"""`sd-vae app`: the page's arithmetic, and the page in a real browser."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import skimage.data
import torch
from PIL import Image

from eval.metrics import psnr_db
from sd_vae.cli import main
from sd_vae.cli.app_page import Playground, build_page
from sd_vae.errors import UserError
from sd_vae.images import to_pil, to_tensor

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE_MS = 120_000  # a busy machine; what is awaited takes a second


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()).crop((180, 60, 220, 93))


@pytest.fixture
def playground(tiny_vae) -> Playground:
    return Playground(tiny_vae, max_side=64)


def test_look_shows_what_the_vae_makes_of_a_picture(playground, picture) -> None:
    looked = playground.look(picture)

    with torch.no_grad():
        z = playground.vae.encode(torch.nn.functional.pad(to_tensor(picture), (0, 0, 0, 1), "reflect"))
        recon = playground.vae.decode(z.latent_dist.mode()).sample[..., :33, :]
    assert looked.recon.tobytes() == to_pil(recon).tobytes()
    assert looked.facts["latents"] == "4 x 17 x 20"
    assert looked.facts["PSNR"] == f"{psnr_db(looked.recon, picture):.2f} dB"
    assert looked.error.size == picture.size
    assert looked.latents.size == (4 * (4 * 22 - 2), 4 * 17)


def test_look_makes_large_pictures_smaller(playground, picture) -> None:
    assert playground.look(picture.resize((400, 330))).picture.size == (64, 53)


def test_shift_channels_moves_in_standard_deviations(playground, picture) -> None:
    looked = playground.look(picture)

    shifted = playground.shift_channels(looked, [0.0, 2.0])

    z = looked.z.clone()
    z[:, 1] += 2 * z[:, 1].std(correction=0)
    assert shifted.tobytes() == playground.decode(z, picture.size).tobytes()
    assert playground.shift_channels(looked, [0.0] * 4).tobytes() == looked.recon.tobytes()


@pytest.mark.parametrize("path", ["lerp", "slerp"])
def test_between_ends_at_both_pictures(playground, picture, path) -> None:
    looked, other = playground.look(picture), picture.transpose(Image.Transpose.ROTATE_180)

    ends = [playground.between(looked, other, place, path) for place in (0.0, 1.0)]

    assert psnr_db(ends[0], looked.recon) > 50
    assert psnr_db(ends[1], playground.look(other).recon) > 50


def test_round_trips_begin_with_the_reconstruction(playground, picture) -> None:
    looked = playground.look(picture)

    once, twice = (playground.round_trips(looked, count) for count in (1, 2))

    assert once[0].tobytes() == looked.recon.tobytes()
    assert twice[0].tobytes() == playground.look(looked.recon).recon.tobytes()
    assert twice[1] == [*once[1], psnr_db(twice[0], picture)]


def test_build_page_names_the_extra_without_gradio(playground, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)

    with pytest.raises(UserError, match=r"pip install \"sd-vae\[app\]\""):
        build_page(playground, "tiny")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--port", "65536"], "--port is 65536"), (["--max-side", "0"], "--max-side is 0, it must be at least 1")],
)
def test_app_refuses(place, capsys, arguments, words) -> None:
    assert main(["app", "start", *arguments]) == 2

    assert words in capsys.readouterr().err


@pytest.fixture
def url(place) -> Iterator[str]:
    """Where the command serves its page, as a process of its own, which Ctrl-C ends."""
    command = [sys.executable, "-m", "sd_vae", "app", "start", "--port", "0", "--max-side", "64"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as served:
        lines = []
        for line in served.stderr:
            lines.append(line)
            if "(Ctrl-C ends it)" in line:
                break
        assert lines, "the command ended at once"
        assert lines[-1].startswith("http://127.0.0.1:"), "".join(lines)
        yield lines[-1].split()[0]
        served.send_signal(signal.SIGINT)
        assert served.wait() == 130


@pytest.fixture
def page(url):
    """The page in Chromium; `page.requests` and `page.problems` fill as they come."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install 'sd-vae[test]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.requests, page.problems = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(url)
        yield page
        browser.close()


@pytest.mark.slow
def test_page_in_chromium(page, picture, tmp_path) -> None:
    picture.save(tmp_path / "a.png")
    picture.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "b.png")

    page.set_input_files("#given input[type=file]", tmp_path / "a.png")
    for part in ("#picture", "#recon", "#error", "#latents"):
        page.wait_for_selector(f"{part} img")
    assert "4 x 17 x 20" in page.inner_text("#facts")

    page.get_by_role("tab", name="Channels").click()
    before = page.get_attribute("#shifted img", "src")
    page.fill("#channel1 input[type=number]", "2")
    page.press("#channel1 input[type=number]", "Enter")
    page.locator("#channel1 input[type=range]").focus()
    page.locator("#channel1 input[type=range]").press("ArrowRight")
    page.wait_for_function("before => document.querySelector('#shifted img').src !== before", arg=before)

    page.get_by_role("tab", name="Interpolation").click()
    before = page.get_attribute("#blended img", "src")
    page.set_input_files("#other input[type=file]", tmp_path / "b.png")
    page.wait_for_function("before => document.querySelector('#blended img').src !== before", arg=before)

    page.get_by_role("tab", name="Round trips").click()
    page.click("#go")
    page.wait_for_function("document.querySelector('#levels').innerText.split(',').length === 5")

    here = page.url.split("?")[0].rstrip("/")
    assert [url for url in page.requests if not url.startswith((here, "data:", "blob:"))] == []
    assert page.problems == []
