"""The report's page: whole, escaped, and without anything from elsewhere."""

import base64
import re
from html.parser import HTMLParser

import pytest

from alexnet_mp.plotting.report import Report, ReportPicture, ReportTable, Section, render

VOID = {"meta", "img", "br", "link", "input"}
HOSTILE = "<script>alert('1')</script> & \"quoted\" 猫"


class Page(HTMLParser):
    """Elements, their attributes and the text that is seen. Elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [found[name] for _, found in self.elements if name in found]


def report(text: str = "plain", sections: int = 2) -> Report:
    return Report(
        text,
        text,
        [(text, text)],
        [
            Section(
                f"{text} {n}",
                text,
                text,
                [text],
                [ReportPicture(b"\x89PNG\r\n", text, text)] * 2,
                [ReportTable([text, text], [[text, text]], text, folded) for folded in (0, 1)],
            )
            for n in range(sections)
        ],
    )


def test_every_element_is_closed_where_it_was_opened() -> None:
    tags = [tag for tag, _ in Page(render(report())).elements]
    assert tags.count("section") == 2 and tags.count("img") == 4 and tags.count("details") == 2


def test_a_page_that_is_not_well_formed_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        Page("<p><b>text</p></b>")


def test_nothing_is_fetched_from_anywhere_and_no_script_runs() -> None:
    text = render(report())
    page = Page(text)
    assert all(target.startswith("data:image/png;base64,") for target in page.attributes("src"))
    assert all(target.startswith("#") for target in page.attributes("href"))
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "video"}
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r'"data:[^"]*"', '""', text))
    assert "default-src 'none'" in "".join(page.attributes("content"))


def test_a_picture_lies_in_the_page() -> None:
    source = Page(render(report())).attributes("src")[0]
    assert base64.b64decode(source.partition(",")[2]) == b"\x89PNG\r\n"


def test_what_comes_from_outside_is_shown_as_it_is_and_never_as_an_element() -> None:
    text = render(report(HOSTILE))
    page = Page(text)
    assert "<script" not in text and "script" not in {tag for tag, _ in page.elements}
    assert page.attributes("alt") == [HOSTILE] * 4
    shown = page.text.count(HOSTILE)
    # title, heading, subtitle, figure (2); each section twice in its title, once in the rest
    assert shown == 5 + 2 * (2 + 3 + 2 + 2 * 5)


def test_links_lead_to_sections_of_the_page() -> None:
    page = Page(render(report(HOSTILE, sections=3)))
    places = page.attributes("id")
    assert len(set(places)) == 3
    assert page.attributes("href") == [f"#{place}" for place in places]


def test_the_page_follows_the_readers_light_or_dark_and_the_width_of_a_phone() -> None:
    text = render(report())
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in "".join(Page(text).attributes("content"))


def test_a_missing_part_is_named_with_its_reason() -> None:
    page = Page(render(Report("run", "", (), [Section("Curves", missing=["no epoch has ended"])])))
    assert "Missing: no epoch has ended" in page.text
