"""The picture of a step: every message an arrow, every wait red, every layer named."""

from collections import Counter

import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from alexnet_mp.plotting.timeline import BETWEEN_RANKS, WAIT_COLOR, draw_timeline, readable_bytes

LAYERS = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


def span(layer: str, direction: str, begin: float, end: float, half: str = "") -> dict:
    return {"layer": layer, "pass": direction, "half": half, "begin": begin, "end": end}


def rank_of(number: int, late: float = 0.0) -> dict:
    """Eight layers forward and back, 10 ms each; conv3 waits 4 ms between its halves."""
    forward = [span(layer, "forward", i * 0.01, (i + 1) * 0.01) for i, layer in enumerate(LAYERS)]
    forward[2:3] = [
        span("conv3", "forward", 0.02, 0.0235, "own"),
        span("conv3", "forward", 0.0275, 0.03, "peers"),
    ]
    backward = [
        span(layer, "backward", 0.08 + i * 0.01, 0.09 + i * 0.01)
        for i, layer in enumerate(reversed(LAYERS))
    ]
    blocks = [*forward, *backward, span("update", "between", 0.16, 0.17)]
    waits = [span("conv3", "forward", 0.0235, 0.0275)]
    moved = [
        [part | {"begin": part["begin"] + late, "end": part["end"] + late} for part in parts]
        for parts in (blocks, waits)
    ]
    return {
        "rank": number,
        "columns": [number],
        "seconds": 0.17,
        "exposed_seconds": 0.004,
        "blocks": moved[0],
        "waits": moved[1],
    }


def message(layer: str, direction: str, sender: int, to: int, sent: float, arrived: float) -> dict:
    places = {"from": sender, "to": to, "sent": sent, "arrived": arrived}
    return {"layer": layer, "pass": direction, "bytes": 2768896} | places


CROWDED = [
    message(layer, direction, sender, 1 - sender, sent, sent + length)
    for sender in (0, 1)
    for layer, direction, sent, length in [
        ("conv3", "forward", 0.019, 0.006),
        ("fc6", "forward", 0.05, 0.001),
        ("fc7", "forward", 0.0505, 0.0295),
        ("fc8", "forward", 0.0795, 0.0005),  # at the very end: its label lies before it
        ("conv5, conv4", "backward", 0.1, 0.05),
        ("conv3", "backward", 0.1001, 0.06),
    ]
]


def step(ranks: int = 2, messages: list[dict] | None = None) -> dict:
    return {
        "step": 14,
        "device": "cpu",
        "batch": 32,
        "column_ranks": ranks,
        "data_ranks": 1,
        "ranks": [rank_of(number, 0.001 * number) for number in range(ranks)],
        "messages": CROWDED if messages is None else messages,
    }


def arrows(figure) -> list[Annotation]:
    return [text for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)]


def words(figure) -> list:
    """Every text with letters, and where it stands, in pixels."""
    figure.canvas.draw()
    texts = [text for axes in figure.axes for text in axes.texts] + figure.texts
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]


def test_each_message_is_an_arrow_from_its_sending_to_its_arrival(tmp_path) -> None:
    figure = draw_timeline(step(), tmp_path / "timeline.png")
    found = Counter((round(a.xyann[0], 3), round(a.xy[0], 3)) for a in arrows(figure))
    wanted = Counter((round(1e3 * m["sent"], 3), round(1e3 * m["arrived"], 3)) for m in CROWDED)
    assert found == wanted
    assert 20_000 < (tmp_path / "timeline.png").stat().st_size < 200_000


@pytest.mark.parametrize(("sender", "way"), [(0, 1), (1, -1)])
def test_arrows_lead_from_the_senders_rows_to_the_receivers(sender: int, way: int) -> None:
    figure = draw_timeline(step(messages=[m for m in CROWDED if m["from"] == sender]))
    for arrow in arrows(figure):  # rank 0 is above, and the y axis points down
        assert arrow.xy[1] - arrow.xyann[1] == pytest.approx(way * BETWEEN_RANKS)


def test_each_message_names_its_layer_and_bytes() -> None:
    labels = Counter(text for text, _ in words(draw_timeline(step())))
    assert labels["conv3 2.77 MB"] == 4 and labels["fc8 2.77 MB"] == 2
    assert labels["conv5–conv4 2.77 MB"] == 2


def test_no_words_overlap_however_close_the_messages_are() -> None:
    found = words(draw_timeline(step(4)))
    for n, (text, place) in enumerate(found):
        for other, their_place in found[n + 1 :]:
            overlap = place.x0 < their_place.x1 and their_place.x0 < place.x1
            overlap &= place.y0 < their_place.y1 and their_place.y0 < place.y1
            assert not overlap, f"{text} and {other}"


def test_red_is_what_the_ranks_waited_and_the_sum_is_written() -> None:
    figure = draw_timeline(step())
    red = [
        bar.get_width()
        for axes in figure.axes
        for bar in axes.patches
        if to_hex(bar.get_facecolor()) == WAIT_COLOR
    ]
    assert red == pytest.approx([4.0, 4.0])
    assert "rank 0 waits 4.0 ms, rank 1 waits 4.0 ms" in [text for text, _ in words(figure)]


def test_every_layer_is_named_once_a_rank_and_pass() -> None:
    names = Counter(text for text, _ in words(draw_timeline(step(messages=[]))))
    assert {names[layer] for layer in LAYERS} == {4}  # two ranks, two passes


def test_a_crossings_name_stands_on_its_wider_half() -> None:
    forward = draw_timeline(step()).axes[0]
    places = [text.get_position()[0] for text in forward.texts if text.get_text() == "conv3"]
    assert places == pytest.approx([(20 + 23.5) / 2, 1 + (20 + 23.5) / 2])


@pytest.mark.parametrize(
    ("columns", "copies", "words_in_title"),
    [(2, 1, "model parallel"), (1, 2, "data parallel"), (2, 2, "model and data parallel")],
)
def test_the_title_says_what_the_ranks_share(columns, copies, words_in_title) -> None:
    figure = draw_timeline(step() | {"column_ranks": columns, "data_ranks": copies})
    assert any(f"step, {words_in_title}: 2 ranks" in text for text, _ in words(figure))


def test_a_batch_in_parts_is_drawn_on_one_axis_of_time() -> None:
    parts = rank_of(0)
    later = [b | {"begin": b["begin"] + 0.2, "end": b["end"] + 0.2} for b in parts["blocks"]]
    parts["blocks"] = [*parts["blocks"], *later]
    figure = draw_timeline(step(messages=[]) | {"ranks": [parts]})
    (axes,) = figure.axes
    assert axes.get_xlim() == pytest.approx((0, 370))
    assert len(draw_timeline(step()).axes) == 2


def test_a_step_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no blocks"):
        draw_timeline(step() | {"ranks": []})


@pytest.mark.parametrize(
    ("count", "text"), [(384, "384 B"), (65536, "65.5 kB"), (2768896, "2.77 MB"), (3e9, "3 GB")]
)
def test_bytes_are_readable(count: float, text: str) -> None:
    assert readable_bytes(count) == text
