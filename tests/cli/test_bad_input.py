"""Every command under bad input: exit code 2, one line that names what, which value and the remedy, nothing touched.

`convert`, `reconstruct` and `inspect` have tables of their own for what only they take; here is what is left.
"""

import re
import shutil
from pathlib import Path

import pytest

from sd_vae.cli import main

TRAIN = "train --config r.yaml --out o"
MSSSIM = f"{TRAIN} --loss.perceptual.weight 1 --loss.perceptual.net ms_dssim"
VGG = f"{TRAIN} --data.size 64 --loss.perceptual.weight 1 --loss.perceptual.net vgg"

BAD = [
    # no command and none of that name
    ("trian", "unknown command 'trian'; choose one of: demo, train"),
    ("--nonsense", "unknown command '--nonsense'"),
    # arguments
    ("demo", "missing: --out PATH"),
    ("demo --nonsense 1", "missing: --out PATH; unknown: --nonsense 1"),
    ("demo --out o --steps x", "--steps is 'x', it must be a whole number"),
    ("demo --out o --steps 0", "--steps is 0, it must be at least 1"),
    ("reconstruct start photos", "missing: --out PATH"),
    ("reconstruct start photos --out o --size 1.5", "--size is '1.5', it must be a whole number"),
    ("reconstruct start photos --out o --dtype int8", "--dtype is 'int8', it must be one of: float32, float16"),
    ("convert", "missing: SRC, DST, --layout {diffusers,ldm,webui}"),
    ("convert start o --layout", "--layout needs a value"),
    ("convert start o --lay ldm", "missing: --layout"),
    ("convert start o p --layout ldm", "unknown: p"),
    ("inspect start --confg x", "unknown: --confg x; did you mean --config?"),
    ("train", "say what to train with --config RECIPE, or what to go on with by --resume RUN"),
    ("train --config", "--config needs a value"),
    ("train --resume", "--resume needs a value"),
    (f"{TRAIN} --stps 3", "unknown: --stps 3; did you mean --steps?"),
    (f"{TRAIN} --lr 3", "unknown: --lr 3; did you mean --optim.discriminator-lr or --optim.lr?"),
    (f"{TRAIN} again", "unknown: again"),
    (f"{TRAIN} --steps 1.5", "--steps is '1.5', it must be a whole number"),
    (f"{TRAIN} --optim.lr abc", "--optim.lr is 'abc', it must be a number"),
    (f"{TRAIN} --optim.betas 1", "--optim.betas needs 2 values"),
    (f"{TRAIN} --steps 0", "steps is 0, it must be at least 1"),
    (f"{TRAIN} --optim.lr inf", "optim.lr is inf, it must be a finite number above 0"),
    (f"{TRAIN} --seed 99999999999999999999", "seed is 99999999999999999999, it must be in [0, 2^63)"),
    (f"{TRAIN} --model.preset sd9", "model.preset is 'sd9', choose one of: sd1"),
    (f"{TRAIN} --loss.perceptual.net vg", "--loss.perceptual.net is 'vg', it must be one of: vgg, alex"),
    (f"{TRAIN} --data.crop-scale 0 2", "data.crop_scale is (0.0, 2.0), it must satisfy"),
    # recipes
    ("train --config nope.yaml --out o", "there is no recipe nope.yaml"),
    ("train --config photos --out o", "cannot read photos: Is a directory"),
    ("train --config note.txt --out o", "note.txt holds str, a recipe is a mapping"),
    ("train --config start/diffusion_pytorch_model.safetensors --out o", "is not YAML"),
    ("train --config start/config.json --out o", "unknown key 'act_fn'"),
    ("train --config r.yaml", "out must be given; set it in the recipe or add --out VALUE"),
    # data
    (f"{TRAIN} --data.train nope", "there is no data at nope"),
    (f"{TRAIN} --data.train empty", "empty holds no pictures"),
    (f"{TRAIN} --data.train texts", "texts holds no pictures"),
    (f"{TRAIN} --data.train note.txt", "note.txt is no folder and no parquet file"),
    (f"{TRAIN} --data.train unreadable", "none of the 1 pictures of unreadable can be read"),
    (f"{TRAIN} --data.validation nope", "there is no data at nope"),
    (f"{TRAIN} --data.validation empty", "empty holds no pictures"),
    (f"{TRAIN} --data.validation unreadable", "none of the 1 pictures can be read; the first: cannot read the picture"),
    (f"{TRAIN} --data.size 17", "data.size is 17, it must be a multiple of the factor 2"),
    (f"{TRAIN} --data.size -16", "data.size is -16, it must be at least 1 pixel"),
    # weights
    (f"{TRAIN} --model.pretrained nope", "there is nothing at nope"),
    (f"{TRAIN} --model.pretrained empty", "empty holds neither config.json nor a vae folder"),
    (f"{TRAIN} --model.pretrained note.txt", "note.txt is not a checkpoint"),
    (f"{TRAIN} --model.pretrained nan", "not finite in 1 tensors: quant_conv.bias"),
    (MSSSIM, "ms_dssim needs images of at least 44x44 pixels, these are 16x16"),
    (VGG, "HF_HUB_OFFLINE forbids to download it; copy it there, or set perceptual.backbone"),
    (f"{VGG} --loss.perceptual.backbone nope.pth", "there is no LPIPS backbone nope.pth"),
    # output
    (f"{TRAIN} --out photos", "photos exists; choose another place or pass --overwrite"),
    (f"{TRAIN} --out photos --overwrite", "photos exists and is not a run folder (it holds 0.png)"),
    (f"{TRAIN} --out . --overwrite", ". exists and is not a run folder"),
    (f"{TRAIN} --out note.txt --overwrite", "note.txt is a file and not a run folder"),
    (f"{TRAIN} --out note.txt/x/y", "cannot write note.txt/x/y: note.txt is a file, not a folder"),
    (f"{TRAIN} --out photos/run", "out is photos/run, inside data.train, photos"),
    ("demo --out photos", "photos exists; choose another place or pass --overwrite"),
    ("demo --out photos --overwrite", "photos exists and is not a demo (it holds 0.png)"),
    ("demo --out note.txt --overwrite", "note.txt is a file and not a demo"),
    ("demo --out note.txt/x", "note.txt is a file, not a folder"),
    # resume
    ("train --resume nope", "nope is not a run folder"),
    ("train --resume photos", "photos is not a run folder"),
    ("train --resume o --overwrite", "--resume takes everything from the run folder; leave the other options out"),
    ("train --resume o --config r.yaml", "leave the other options out"),
]


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refuse(arguments: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command; assert that it refuses in one line and touches nothing."""
    before = contents(folder)

    code = main(arguments.split())

    output = capsys.readouterr()
    assert code == 2
    assert re.fullmatch(r"error: .*[.?)]\n", output.err), output.err
    assert message in output.err
    assert output.out == ""
    assert contents(folder) == before


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_refused_in_one_line(
    arguments: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(arguments, message, place, capsys)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("photos", "--data.train o/samples", "data.train is o/samples, inside out, o, which is written anew"),
        ("start", "--model.pretrained o/samples", "model.pretrained is o/samples, inside out, o"),
        ("photos", "--model.pretrained nope", "there is nothing at nope"),
    ],
)
def test_overwrite_keeps_the_old_run_when_the_new_one_cannot_start(
    source: str, arguments: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, "o/samples")
    Path("o/config.yaml").touch()

    refuse(f"{TRAIN} --overwrite {arguments}", message, place, capsys)


@pytest.mark.parametrize(
    ("arguments", "own"),
    [(TRAIN, "config.yaml"), ("demo --out o", "report.json"), ("demo --out o", "photos/held_out/a.png")],
)
def test_overwrite_replaces_no_folder_with_anything_else_in_it(
    arguments: str, own: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("o", own).parent.mkdir(parents=True)
    Path("o", own).touch()
    Path("o/diary.txt").write_text("dear diary")

    refuse(f"{arguments} --overwrite", "(it holds diary.txt), so it is not replaced", place, capsys)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "steps: [", "is not YAML"),
        ("config.yaml", "stepz: 3", "unknown key 'stepz', did you mean 'steps'?"),
        ("checkpoints/step-0000003/state.json", "{", "is not JSON"),
        ("checkpoints/step-0000003/optimizer.pt", "", "remove it to resume from the one before"),
        ("checkpoints/step-0000003/model.safetensors", "cut", "remove it to resume from the one before"),
    ],
)
def test_resume_refuses_a_damaged_run(
    file: str, content: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(TRAIN.split())
    Path("o/report.json").unlink()
    Path("o", file).write_text(content)
    capsys.readouterr()

    refuse("train --resume o", message, place, capsys)


def test_resume_without_a_checkpoint_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(TRAIN.split())
    Path("o/report.json").unlink()
    shutil.rmtree("o/checkpoints")
    capsys.readouterr()

    refuse("train --resume o", "holds no checkpoint to resume from", place, capsys)
