import random

from eval.metrics import METRICS
from eval.shares import Gallery, Share

TABLE = {"psnr_db": METRICS["psnr_db"]}


def share_of(psnrs, start=0, first=2, worst=2):
    share = Share.of(["row"], num_pictures=first, num_worst=worst)
    for position, psnr in enumerate(psnrs, start=start):
        values = {"psnr_db": psnr}
        if share.gallery.wants(values, TABLE):
            share.gallery.offer(position, f"photo {position}", {"row": psnr}, values, TABLE)
    return share


def test_gallery_keeps_the_first_and_the_worst_in_the_photos_order():
    share = share_of([30.0, 29.0, 31.0, 20.0, 25.0, 19.0, 40.0])

    assert list(share.gallery.pictures()) == ["photo 0", "photo 1", "photo 3", "photo 5"]


def test_gallery_never_holds_more_than_it_keeps():
    psnrs = [random.Random(0).uniform(10, 40) for _ in range(500)]

    gallery = share_of(psnrs).gallery

    assert (len(gallery.first), len(gallery.worst)) == (2, 2)
    assert not Gallery(0, 0).wants({"psnr_db": 0.0}, TABLE)


def test_merged_galleries_are_that_of_one_process():
    psnrs = [20.0, 20.0, 30.0, 20.0, 10.0, 20.0, 5.0, 20.0]

    alone = share_of(psnrs)
    together = Share.merged([share_of(psnrs[:3]), share_of(psnrs[3:], start=3)])

    assert together.gallery.pictures() == alone.gallery.pictures()
