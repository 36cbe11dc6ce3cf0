"""The page of a report as a reader has it: in a real browser, on a desk and a phone, in light and dark."""

import pytest

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def test_page_loads_without_errors_and_without_network(visit, url):
    page = visit()

    assert page.problems == []
    assert [request for request in page.requests if not request.startswith("data:")] == [url]
    assert page.locator(".viewer").count() == 2


def test_page_cannot_reach_the_network(visit, url):
    page = visit()

    result = page.evaluate("fetch('https://example.invalid/').then(() => 'answered', () => 'refused')")

    assert result == "refused"
    assert any("Content Security Policy" in problem for problem in page.problems)


def test_page_runs_no_code_from_names(visit, evil):
    page = visit()

    page.locator(".pick-right").first.select_option(evil)

    assert page.evaluate("window.hacked") is None
    assert page.locator(".stage .right").first.text_content() == evil
    assert page.locator("img[onerror]").count() == 0


def test_headings_sort_the_photos_by_mouse_and_keyboard(visit):
    page = visit()
    table = page.locator("table.sortable")
    heading = table.locator("thead th").nth(2)

    def column():
        return table.locator("tbody td:nth-child(3)").all_text_contents()

    table.locator("thead button").first.click()
    heading.locator("button").click()
    rising, order = column(), heading.get_attribute("aria-sort")
    page.keyboard.press("Enter")

    assert rising == ["−2.00", "−1.00", "9.50", "26.50", "27.00", "28.00", "30.25", "31.00", "∞"]
    assert order == "ascending"
    assert column() == rising[::-1]
    assert table.locator("thead th").evaluate_all("all => all.map(one => one.getAttribute('aria-sort'))") == [
        "none",
        "none",
        "descending",
    ]


def test_page_of_a_phone_does_not_scroll_sideways(visit):
    page = visit(**PHONE)

    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("Math.max(...[...document.querySelectorAll('main > section')].map(s => s.scrollWidth))") <= 390


def test_dark_readers_get_a_dark_page(visit):
    shades = [
        visit(color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]

    levels = [[int(part) for part in shade.removeprefix("rgb(").removesuffix(")").split(",")] for shade in shades]
    assert min(levels[0]) > 200
    assert max(levels[1]) < 60


CONTRASTS = """() => {
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const found = [];
    for (const one of document.querySelectorAll("body *")) {
        const words = [...one.childNodes].filter(node => node.nodeType === 3).map(node => node.data.trim()).join("");
        if (!words || one.closest("script, template, title, .stage") || !one.getClientRects().length) continue;
        const style = getComputedStyle(one);
        const ink = parse(one instanceof SVGElement ? style.fill : style.color).slice(0, 3);
        let under = one, paper;
        do {
            paper = parse(getComputedStyle(under).backgroundColor);
            under = under.parentElement;
        } while (paper[3] === 0);
        const [low, high] = [light(ink), light(paper.slice(0, 3))].sort((a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), words]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")

    found = page.evaluate(CONTRASTS)

    assert len(found) > 100
    assert [text for text in found if text[0] < 4.5] == []  # WCAG 2 AA


FOCUS = """() => {
    const one = document.activeElement, box = one.getBoundingClientRect();
    const isOutlined = [one, one.closest(".stage")].some(it => it && getComputedStyle(it).outlineStyle !== "none");
    return [one.className || one.tagName, isOutlined, box.bottom > 0 && box.top < innerHeight];
}"""


def test_page_can_be_walked_by_keyboard(visit):
    page = visit(reduced_motion="reduce")

    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUS))

    assert seen[0][0] == "skip"
    assert {"stage", "pick-left", "zoom-in"} <= {name for name, _, _ in seen}
    assert [name for name, outlined, visible in seen if not (outlined and visible)] == []


def test_page_without_scripts_has_its_numbers_and_pictures(visit):
    page = visit(java_script_enabled=False)

    assert page.locator(".viewer").count() == 0
    assert not page.locator(".needs-script").first.is_visible()
    assert page.locator("article.photo img").count() == 14
    assert page.locator("table.sortable tbody tr").count() == 9
