import base64
import csv
import hashlib
import io
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from eval.evaluator import evaluate
from eval.page import MAX_SIDE
from eval.report import OWN, Figure, Section, write_report
from sd_vae.errors import UserError

VOID = {"meta", "link", "img", "input", "line", "polyline", "br"}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and tags that were not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.strong, self.open, self.crossed = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID and self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "strong":
            self.strong.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def evaluation(tiny_vae, photos, perceptual):
    return evaluate({"trained": tiny_vae}, photos, perceptual=perceptual, box_blocks=(8, 4), max_pictures=2)


@pytest.fixture
def write(evaluation, tmp_path):
    """Write the fullest report there is; returns its page and its numbers."""

    def write_one(result=evaluation, folder="report", **changes):
        given = {
            "title": "A small story",
            "summary": ["It trained.", "It works."],
            "curves": {"total": [(step, 1 / (step + 1)) for step in range(50)], "kl": [(0, 0.0), (9, 2.0)]},
            "sections": [
                Section(
                    title="In a pipeline",
                    text=["It ran."],
                    facts={"Largest difference": "0"},
                    figures=[Figure(picture=Image.new("RGB", (900, 300), "red"), caption="a red picture")],
                )
            ],
            "provenance": {"Seed": "0"},
        }
        write_report(tmp_path / folder, result, **given | changes)
        html = (tmp_path / folder / "report.html").read_text(encoding="utf-8")
        return Page(html), json.loads((tmp_path / folder / "report.json").read_text(encoding="utf-8"))

    return write_one


def test_report_is_well_formed_html(write):
    page, _ = write()

    assert page.crossed == []
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(ids)


def test_report_takes_nothing_from_elsewhere(write, tmp_path):
    page, _ = write()

    links = [a[name] for _, a in page.tags for name in ("src", "href", "srcset", "data") if name in a]
    html = (tmp_path / "report" / "report.html").read_text()
    assert all(link.startswith(("data:", "#")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= {a.get("id") for _, a in page.tags}
    assert "url(" not in html
    assert "@import" not in html
    assert "://" not in html


def test_report_describes_every_picture(write):
    page, _ = write()

    assert all(image["alt"] for image in page.all("img"))


def test_report_forbids_scripts_but_its_own(write, tmp_path):
    page, _ = write()

    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_report_shows_every_number_in_its_format(write, evaluation):
    page, _ = write()

    for row in evaluation.rows:
        assert row.name in page.text
        for name, metric in evaluation.metrics.items():
            assert metric.format(row.means[name]) in page.text
            assert all(metric.format(photo.metrics[name]) in page.text for photo in row.photos)
    for heading in ("PSNR (dB) ↑", "SSIM ↑", "mean_difference ↓", "KL per element (nats)", "Estimated scaling factor"):
        assert heading in page.text


def test_report_highlights_the_best_row_of_each_metric(write, evaluation):
    page, _ = write()

    best = evaluation.row("4x4 box average").means
    assert page.strong == [metric.format(best[name]) for name, metric in evaluation.metrics.items()]


def test_report_says_that_it_shows_the_first_photos_only(write):
    page, _ = write()

    assert "2 of 3 photos are shown" in page.text


def test_report_tells_the_latent_shape_where_all_photos_share_it(write, tiny_vae, photos):
    squares, _ = write(evaluate([tiny_vae], photos, size=24), folder="squares")
    sizes, _ = write(evaluate([tiny_vae], photos), folder="sizes")

    assert "4×12×12" in squares.texts
    assert "3 : 1" in squares.texts
    assert "Pixel to latent values" not in sizes.texts


def test_report_shrinks_pictures_to_the_page(write):
    page, _ = write()

    sizes = []
    for image in page.all("img"):
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        sizes.append(max(picture.size))
    assert max(sizes) == MAX_SIDE


def test_report_json_has_the_numbers_of_the_evaluation(write, evaluation):
    _, numbers = write()

    assert numbers["evaluation"] == json.loads(json.dumps(evaluation.to_dict()))
    assert numbers["curves"]["kl"] == [[0, 0.0], [9, 2.0]]
    assert (numbers["format"], numbers["version"], numbers["title"]) == ("sd-vae report", 1, "A small story")
    assert numbers["sections"][0]["figures"] == ["a red picture"]
    assert numbers["provenance"] == {"Seed": "0"}


def test_report_is_the_same_for_two_runs(write, tiny_vae, photos, perceptual, tmp_path):
    again = evaluate({"trained": tiny_vae}, photos, perceptual=perceptual, box_blocks=(8, 4), max_pictures=2)

    write()
    write(again, folder="again")

    for name in OWN:
        assert (tmp_path / "report" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_report_escapes_names_that_are_code(write, tiny_vae, photos):
    evil = '"><script>alert(1)</script>.png'
    result = evaluate({evil: tiny_vae}, {evil: photos["cat"], "b": photos["coffee"]}, box_blocks=(4,))

    page, numbers = write(
        result,
        title=evil,
        summary=[evil],
        curves={evil: [(0, 1.0), (1, 2.0)]},
        sections=[Section(title=evil, text=[evil], facts={evil: evil})],
        provenance={evil: evil},
    )

    assert len(page.all("script")) == 1
    assert not any("alert" in tag or any(name.startswith("alert") for name in a) for tag, a in page.tags)
    assert page.text.count(evil) > 10
    assert numbers["evaluation"]["photos"][0]["name"] == evil


def test_report_of_one_photo_and_nothing_else_leaves_the_rest_out(write, tiny_vae, photos):
    result = evaluate([tiny_vae], {"cat": photos["cat"]})

    page, numbers = write(result, summary=(), curves=None, sections=(), provenance=None)

    assert "Curves" not in page.texts
    assert "Seed" not in page.texts
    assert "Photo by photo" not in page.texts
    assert numbers["curves"] == {}


def test_report_of_infinite_psnr_is_valid_json(write, tiny_vae):
    result = evaluate([tiny_vae], {"flat": Image.new("RGB", (16, 16), "red")}, box_blocks=(16,))

    page, numbers = write(result)

    assert "∞" in page.text
    assert numbers["evaluation"]["rows"][1]["means"]["psnr_db"] is None


def test_report_is_not_written_when_a_curve_is_broken(write, tmp_path):
    with pytest.raises(UserError, match="'total' is not finite at step 3"):
        write(curves={"total": [(3, float("inf"))]})

    assert not (tmp_path / "report").exists()


def test_report_lists_every_photo_and_row_as_csv(write, evaluation, tmp_path):
    write()

    with (tmp_path / "report" / "per_image.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["photo", "row", "width", "height", *evaluation.metrics]
    assert [(line["photo"], line["row"]) for line in lines] == [
        (photo.name, row.name) for photo in evaluation.photos for row in evaluation.rows
    ]
    last = evaluation.rows[-1].photos[-1]
    assert {name: float(lines[-1][name]) for name in evaluation.metrics} == last.metrics
    assert (lines[0]["width"], lines[0]["height"]) == ("37", "25")


def test_report_csv_keeps_names_with_commas_quotes_and_line_ends(write, tiny_vae, photos, tmp_path):
    name = 'a, "b"\nc'

    write(evaluate([tiny_vae], {name: photos["cat"]}))

    with (tmp_path / "report" / "per_image.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["photo"] == name


def test_report_writes_the_files_that_it_names(write, tmp_path):
    write()

    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(OWN)


def test_report_refuses_a_negative_gallery(write):
    with pytest.raises(UserError, match="worst is -1 photos, it must be at least 0"):
        write(worst=-1)


def test_report_refuses_to_rank_by_what_has_no_direction(write):
    with pytest.raises(UserError, match="cannot be ranked by 'kl'; choose one of: psnr_db, ssim, mean_difference"):
        write(worst_by="kl")
