"""The viewer of a report in a real browser: by mouse, by fingers, by keyboard."""

import pytest

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def cut(page):
    """Where the border of the first viewer is, in percent, as the browser clips the right picture."""
    clip = page.locator(".pane").nth(1).evaluate("pane => getComputedStyle(pane).clipPath")
    return float(clip.removeprefix("inset(0px 0px 0px ").removesuffix("%)"))


def transforms(page):
    """How the two pictures of the first viewer lie in their panes, as the browser draws them."""
    return (
        page.locator(".viewer")
        .first.locator(".pane img")
        .evaluate_all(
            """images => images.map(image => {
            const [a, b] = [image, image.parentElement].map(one => one.getBoundingClientRect());
            return [a.left - b.left, a.top - b.top, a.width / b.width, a.height / b.height];
        })"""
        )
    )


def middle(page):
    """The middle of the first viewer in the window."""
    stage = page.locator(".stage").first
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box


def drag(page, start, end):
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=4)
    page.mouse.up()


def test_slider_moves_the_border_by_keyboard(visit):
    page = visit()
    slider = page.locator(".controls input").first
    before = cut(page)

    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")

    assert (before, cut(page)) == (50.0, 60.0)
    assert slider.get_attribute("aria-valuetext") == "60 percent"
    assert "cat" in slider.get_attribute("aria-label")


def test_dragging_a_photo_moves_the_border(visit):
    page = visit()
    x, y, box = middle(page)

    drag(page, (x, y), (x + box["width"] / 4, y))

    assert cut(page) == pytest.approx(75, abs=0.5)
    assert page.locator(".controls input").first.input_value() == "75"


def test_zoom_and_pan_move_both_pictures_alike(visit):
    page = visit()
    page.locator(".zoom-in").first.click()
    page.locator(".zoom-in").first.click()
    zoomed = transforms(page)
    x, y, box = middle(page)

    drag(page, (x + box["width"] / 4, y), (x + box["width"] / 4 + 60, y - 30))

    panned = transforms(page)
    assert zoomed[0] == zoomed[1]
    assert zoomed[0][2:] == pytest.approx([4, 4])
    assert panned[0] == panned[1]
    assert [panned[0][0] - zoomed[0][0], panned[0][1] - zoomed[0][1]] == pytest.approx([60, -30], abs=0.5)
    assert cut(page) == 50


def test_pan_stops_at_the_edge_of_the_photo(visit):
    page = visit()
    page.locator(".zoom-in").first.click()
    x, y, box = middle(page)

    drag(page, (x + 100, y), (x + 100 + 3 * box["width"], y))

    assert transforms(page)[0][0] == pytest.approx(0, abs=0.01)


def test_zoom_keeps_what_is_under_the_pointer(visit):
    page = visit()
    x, y, box = middle(page)
    x, y = x + box["width"] / 4, y + box["height"] / 4

    page.mouse.dblclick(x, y)

    left, top, scale, _ = transforms(page)[0]
    assert scale == pytest.approx(4)
    # the browser rounds the pointer to whole pixels, and the zoom makes three of each
    assert [left, top] == pytest.approx([-3 * 0.75 * box["width"], -3 * 0.75 * box["height"]], abs=3)


def test_keyboard_zooms_pans_and_shows_the_whole(visit):
    page = visit()
    page.locator(".stage").first.focus()

    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    moved = transforms(page)
    page.keyboard.press("0")

    assert moved[0] == moved[1]
    assert moved[0][2] == pytest.approx(2)
    assert moved[0][0] == pytest.approx(-0.6 * page.locator(".pane").first.bounding_box()["width"], abs=1)
    assert transforms(page)[0] == pytest.approx([0, 0, 1, 1])


def test_side_by_side_shows_two_whole_pictures_that_move_together(visit):
    page = visit()
    page.locator("button.apart").first.click()
    page.locator(".zoom-in").first.click()
    x, y, box = middle(page)

    drag(page, (x - box["width"] / 4, y), (x - box["width"] / 4 + 40, y + 20))

    left, right = (page.locator(".pane").nth(n).bounding_box() for n in (0, 1))
    assert left["x"] + left["width"] < right["x"]
    assert left["width"] == pytest.approx(right["width"], abs=0.1)
    assert transforms(page)[0] == pytest.approx(transforms(page)[1], abs=0.1)
    assert page.locator("button.apart").first.get_attribute("aria-pressed") == "true"


def test_any_two_pictures_can_be_compared_and_the_choice_holds_for_all_photos(visit, evil):
    page = visit()

    page.locator(".pick-left").nth(1).select_option("average")
    page.locator(".pick-right").nth(1).select_option(f"{evil}, error")

    for number in range(2):
        article = page.locator("article.photo").nth(number)
        shown = article.locator(".pane img").evaluate_all("images => images.map(image => image.src)")
        wanted = article.locator("figure img").evaluate_all(
            "(images, labels) => labels.map(label => images.find(image => image.dataset.label === label).src)",
            ["average", f"{evil}, error"],
        )
        assert shown == wanted


def test_two_fingers_zoom_both_pictures(visit):
    page = visit(**PHONE)
    x, y, _ = middle(page)
    fingers = page.context.new_cdp_session(page)

    def touch(kind, *points):
        fingers.send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": px, "y": y, "id": n} for n, px in enumerate(points)]},
        )

    touch("touchStart", x - 30, x + 30)
    touch("touchMove", x - 60, x + 60)
    touch("touchMove", x - 90, x + 90)
    touch("touchEnd")

    assert transforms(page)[0] == transforms(page)[1]
    assert transforms(page)[0][2] == pytest.approx(3, abs=0.2)


def test_one_finger_moves_the_border(visit):
    page = visit(**PHONE)
    x, y, box = middle(page)
    fingers = page.context.new_cdp_session(page)

    for kind, dx in (("touchStart", 0), ("touchMove", -20), ("touchMove", -box["width"] / 4)):
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x + dx, "y": y}]})
    fingers.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    assert cut(page) == pytest.approx(25, abs=1)
