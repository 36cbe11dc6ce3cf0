import pytest
from PIL import Image

from eval.photos import find_files, fit_photo, list_photos, read_photo
from sd_vae.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg", "deep/b.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), "red").save(path)
    return tmp_path / "photos"


def test_list_photos_takes_a_folder_sorted_and_tells_equal_names_apart(folder):
    names = [photo.name for photo in list_photos(folder)]

    assert names == ["a.jpg", "photos/b.png", "deep/b.png"]


def test_list_photos_keeps_the_order_of_files(folder):
    photos = list_photos([folder / "b.png", str(folder / "a.jpg")])

    assert [photo.name for photo in photos] == ["b.png", "a.jpg"]


def test_list_photos_takes_one_file(folder):
    assert [photo.source for photo in list_photos(str(folder / "a.jpg"))] == [folder / "a.jpg"]


def test_list_photos_refuses_a_missing_path(tmp_path):
    with pytest.raises(UserError, match=r"no picture or folder .*nowhere\.png"):
        list_photos([tmp_path / "nowhere.png"])


def test_list_photos_refuses_a_file_given_twice(folder):
    with pytest.raises(UserError, match=r"a\.jpg is given 2 times"):
        list_photos([folder / "a.jpg", folder, folder / "deep" / ".." / "a.jpg"][::2])


@pytest.mark.parametrize("nothing", [[], {}])
def test_list_photos_refuses_nothing(nothing):
    with pytest.raises(UserError, match="no photos to evaluate"):
        list_photos(nothing)


def test_find_files_refuses_a_folder_without_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")

    with pytest.raises(UserError, match="holds no pictures"):
        find_files(tmp_path)


def test_fit_photo_leaves_the_size_alone(folder):
    assert fit_photo(read_photo(list_photos(folder)[0]), None).size == (20, 16)


def test_fit_photo_crops_the_centre_and_resizes():
    picture = Image.new("RGB", (30, 10), "red")
    picture.paste("blue", (10, 0, 20, 10))

    square = fit_photo(picture, 8)

    assert square.size == (8, 8)
    assert square.crop((1, 0, 7, 8)).getcolors() == [(48, (0, 0, 255))]
