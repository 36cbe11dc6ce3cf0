import io
import json

import pytest
from PIL import Image

from eval.evaluator import evaluate
from eval.measures import build_measures
from eval.metrics import l1, psnr_db
from eval.photos import Photo
from eval.protocols import get_protocol
from eval.regions import boxes_of
from sd_vae.errors import UserError

PLAIN = get_protocol("native", metrics=["psnr_db", "l1"])


@pytest.fixture
def marked(photos, tmp_path):
    """A folder of photos with boxes, and one without."""
    for name, photo in photos.items():
        photo.save(tmp_path / f"{name}.png")
    rows = [
        {"file_name": "cat.png", "boxes": [[0, 0, 12, 12], [20, 5, 37, 25]], "labels": ["face", "text"]},
        {"file_name": "coffee.png", "boxes": [[3, 3, 20, 20]], "labels": ["text"]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_regions_are_measured_apart_by_label(tiny_vae, marked, photos):
    result = evaluate({"ours": tiny_vae}, marked, protocol=PLAIN, box_blocks=(4,))

    assert [(region.label, region.row, region.num_regions) for region in result.regions] == [
        ("face", "ours", 1),
        ("face", "4x4 box average", 1),
        ("text", "ours", 2),
        ("text", "4x4 box average", 2),
    ]
    recon = result.pictures["cat.png"]["ours"].recon
    face = result.regions[0].means
    box = (0, 0, 12, 12)
    assert face["psnr_db"].value == psnr_db(recon.crop(box), photos["cat"].crop(box))
    assert face["l1"].value == l1(recon.crop(box), photos["cat"].crop(box))


def test_regions_follow_the_resize_and_leave_out_what_is_cropped_away(tiny_vae, marked, photos):
    result = evaluate({"ours": tiny_vae}, marked, protocol=PLAIN, size=50)

    text = next(region for region in result.regions if region.label == "text")
    assert (text.num_regions, text.num_left_out) == (2, 0)
    recon = result.pictures["coffee.png"]["ours"]
    # 30x21 to 71x50, cropped by 10 on the left: [3, 3, 20, 20] is [7 - 10, 7, 47 - 10, 48]
    box = (0, 7, 37, 48)
    coffee = psnr_db(recon.recon.crop(box), recon.original.crop(box))
    cat = text.means["psnr_db"].value * 2 - coffee
    assert 5.0 < cat < 40.0


def test_boxes_come_from_columns_of_text_and_masks():
    mask = Image.new("L", (20, 10))
    mask.paste(200, (3, 2, 9, 8))
    buffer = io.BytesIO()
    mask.save(buffer, "png")
    photo = Photo("a", mask, {"box": "[1, 2, 3, 4]", "mask": {"bytes": buffer.getvalue()}})

    assert list(boxes_of(photo, (20, 10))) == [("box", (1, 2, 3, 4)), ("mask", (3, 2, 9, 8))]
    assert list(boxes_of(Photo("b", mask, {}), (20, 10))) == []


def _mask_bytes(size):
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"boxes": [[0, 0, 4, 4]], "labels": ["a", "b"]}, "a has 1 boxes and 2 labels"),
        ({"box": [0, 0, 40, 4]}, r"a of 20x10 pixels has the box \[0, 0, 40, 4\]; it must be"),
        ({"box": "left"}, "has the box left"),
        ({"box": [4, 4, 0, 0]}, "it must be"),
        ({"mask": 7}, "a has a mask of type int"),
        ({"mask": _mask_bytes((5, 5))}, "a has 20x10 pixels and its mask 5x5"),
        ({"mask": b"no picture"}, "cannot read the picture mask of a"),
    ],
)
def test_boxes_of_refuses(columns, message):
    with pytest.raises(UserError, match=message):
        list(boxes_of(Photo("a", Image.new("RGB", (20, 10)), columns), (20, 10)))


def test_a_part_is_measured_by_the_metrics_that_it_is_large_enough_for(tiny_vae, marked):
    protocol = get_protocol("native", metrics=["psnr_db", "ssim"])
    (marked / "metadata.jsonl").write_text(
        json.dumps({"file_name": "cat.png", "boxes": [[0, 0, 8, 8], [0, 0, 12, 12]], "labels": ["small", "large"]})
    )

    small = evaluate({"ours": tiny_vae}, marked, protocol=protocol).regions

    assert {region.label: list(region.means) for region in small} == {
        "large": ["psnr_db", "ssim"],
        "small": ["psnr_db"],
    }


@pytest.mark.shared
def test_parts_are_measured_by_lpips(tiny_vae, photos, shared, tmp_path):
    photos["cat"].resize((148, 100)).save(tmp_path / "cat.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "cat.png", "box": [10, 10, 80, 80]}))
    weights = {"alex": str(shared / "weights" / "alexnet_features_torchvision.pth")}

    result = evaluate([tiny_vae], tmp_path, metrics=["lpips_alex"], weights=weights)

    pictures = result.pictures["cat.png"]["model 1"]
    measure = build_measures(get_protocol("native", metrics=["lpips_alex"]), weights=weights).functions["lpips_alex"]
    box = (10, 10, 80, 80)
    expected = measure(pictures.recon.crop(box), pictures.original.crop(box))
    assert result.regions[0].means["lpips_alex"].value == expected
