import csv
import json
import os
import subprocess
import sys

import pytest

from sd_vae.cli import main
from sd_vae.cli.eval import _named

QUICK = ("--metrics", "psnr_db", "ssim", "--device", "cpu", "--codecs")


def run_eval(*arguments):
    return main(["eval", *map(str, arguments)])


def report_in(folder):
    return json.loads((folder / "report.json").read_text())


def test_eval_writes_report_and_numbers(place, capsys):
    code = run_eval("start", "photos", "--out", "out", *QUICK)

    assert code == 0
    assert sorted(os.listdir("out")) == ["per_image.csv", "report.html", "report.json"]
    evaluation = report_in(place / "out")["evaluation"]
    assert [row["name"] for row in evaluation["rows"]] == ["start"]
    assert evaluation["protocol"]["name"] == "native"
    assert evaluation["protocol"]["photos"] == "4"
    assert len(evaluation["protocol"]["photos sha256"]) == len(evaluation["rows"][0]["fingerprint"]) == 64
    with open("out/per_image.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    told = capsys.readouterr()
    assert "PSNR (dB) ↑" in told.out
    assert "evaluating photos by native in 1 process on cpu." in told.err


def test_eval_puts_baselines_and_codecs_beside_and_compares(place):
    run_eval("start", "photos", "--out", "out", "--baseline", "again=start", *QUICK, "JPEG", "WebP")

    evaluation = report_in(place / "out")["evaluation"]
    assert [row["name"] for row in evaluation["rows"]] == ["start", "again", "JPEG at equal bits", "WebP at equal bits"]
    verdicts = {(one["against"], one["metric"]): one["verdict"] for one in evaluation["comparisons"]}
    assert verdicts["again", "psnr_db"] == "not distinguishable"
    assert {"Rate"} == {plot["title"] for plot in evaluation["plots"]}


def test_eval_draws_codecs_over_the_rate_when_asked(place):
    run_eval("start", "photos", "--out", "out", *QUICK, "JPEG", "--rates")

    (plot,) = report_in(place / "out")["evaluation"]["plots"]
    assert {name: len(line) for name, line in plot["lines"].items()} == {"start": 1, "JPEG": 5}


def test_eval_twice_gives_the_same_report(place):
    for name in ("one", "two"):
        run_eval("start", "photos", "--out", name, *QUICK, "JPEG", "--round-trips", 2, "--size", 24)

    assert (place / "one" / "report.json").read_bytes() == (place / "two" / "report.json").read_bytes()


def test_eval_prints_its_report_as_json(place, capsys):
    run_eval("start", "photos", "--out", "out", "--json", *QUICK)

    assert json.loads(capsys.readouterr().out) == report_in(place / "out")


def test_eval_lists_photos_that_cannot_be_read(place, capsys):
    code = run_eval("start", "mixed", "--out", "out", *QUICK)

    assert code == 0
    (reject,) = report_in(place / "out")["evaluation"]["rejects"]
    assert reject["name"] == "0.png"
    assert "1 photos could not be evaluated" in capsys.readouterr().err


def test_eval_asks_deeper(place, capsys):
    run_eval("start", "photos", "--out", "out", "--sizes", 16, 24, "--tiling-check", *QUICK)

    evaluation = report_in(place / "out")["evaluation"]
    assert {plot["title"] for plot in evaluation["plots"]} == {"Sizes"}
    assert "passed: start, Tiled against untiled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("start", "mixed", "--strict"), "0.png: cannot read the picture mixed/0.png"),
        (("start", "unreadable"), "none of the 1 photos can be evaluated; the first: 0.png"),
        (("start", "empty"), "empty holds no pictures"),
        (("start", "nowhere"), "there is no data at nowhere"),
        (("nowhere", "photos"), "nothing at nowhere"),
        (("start", "photos", "--protocol", "mine"), "unknown protocol 'mine'; choose one of: pixels, native"),
        (("start", "photos", "--metrics", "psnr"), "unknown metric 'psnr'"),
        (("start", "photos", "--metrics", "rfid"), "rfid: there is no"),
        (("start", "photos", "--metrics", "lpips_alex"), "--weights alex=FILE, or --metrics without lpips_alex"),
        (("start", "photos", "--weights", "alex"), "--weights is 'alex', it must be NETWORK=FILE"),
        (("start", "photos", "--weights", "alex=a", "alex=b"), "--weights names alex twice, a and b"),
        (("start", "photos", "--weights", "clip=a"), "weights are given for 'clip'; choose from: vgg, alex"),
        (("start", "photos", "--baseline", "start"), "two VAEs are called 'start'; tell them apart by NAME=VAE"),
        (("start", "photos", "--metrics", "ms_ssim"), "MS-SSIM needs pictures of at least 176x176 pixels"),
        (("start", "photos", "--round-trips", "1"), "round trips are 1"),
    ],
)
def test_eval_refuses_in_one_line(arguments, message, place, monkeypatch, capsys):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(place / "hub"))
    metrics = () if "--metrics" in arguments else ("--metrics", "psnr_db")

    code = run_eval(*arguments, *metrics, "--out", "out", "--device", "cpu")

    told = capsys.readouterr().err
    assert code == 2
    assert message in told
    assert "Traceback" not in told
    assert not (place / "out").exists()


def test_eval_does_not_replace_what_it_did_not_write(place, capsys):
    code = run_eval("start", "photos", "--out", "photos", "--overwrite", *QUICK)

    assert code == 2
    assert "is not an evaluation" in capsys.readouterr().err


def test_name_of_a_vae_may_stand_before_it(tmp_path):
    (tmp_path / "a=b").mkdir()

    assert _named("mine=folder/vae") == ("mine", "folder/vae")
    assert _named("folder/vae") == (None, "folder/vae")
    assert _named(str(tmp_path / "a=b")) == (None, str(tmp_path / "a=b"))


def test_two_processes_give_the_bytes_of_one(place):
    arguments = ["start", "photos", "--baseline", "again=start", "--round-trips", "2", *QUICK, "JPEG"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    done = [
        subprocess.run(
            [*command, "-m", "eval", *arguments, "--out", out],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for command, out in (([sys.executable], "one"), (launch, "two"))
    ]

    assert [process.returncode for process in done] == [0, 0], done[1].stderr
    assert "in 1 process on cpu" in done[0].stderr
    assert "in 2 processes on cpu" in done[1].stderr
    for name in ("report.json", "per_image.csv", "report.html"):
        assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes()
