"""The classes with the most errors, and what they are taken for."""

import pytest
import torch
from matplotlib.colors import to_hex

from alexnet_mp.plotting.confusion import draw_confusion, worst_classes
from alexnet_mp.plotting.predictions import CORRECT_COLOR

#                        cat: 1 of 4 right   dog: 2 of 2   bird: 0 of 2
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3])
ANSWERS = torch.tensor([0, 3, 3, 1, 1, 1, 0, 1])
NAMES = ["cat", "dog", "unseen", "bird"]


def test_the_worst_class_comes_first_with_what_it_is_taken_for_most_often_first() -> None:
    worst = worst_classes(LABELS, ANSWERS, 10)
    assert [(one.label, one.images, one.correct) for one in worst] == [
        (3, 2, 0),
        (0, 4, 1),
        (1, 2, 2),
    ]
    assert list(worst[1].taken_for.items()) == [(3, 2), (1, 1)]


def test_of_equally_bad_classes_the_one_with_more_images_comes_first() -> None:
    labels = torch.tensor([0, 1, 1, 2])
    assert [one.label for one in worst_classes(labels, labels + 1, 2)] == [1, 0]


def test_a_bar_is_green_for_the_share_that_is_right_and_whole_in_all() -> None:
    figure = draw_confusion(worst_classes(LABELS, ANSWERS, 3), NAMES)
    (axes,) = figure.axes
    bars = {row: [] for row in range(3)}
    for bar in axes.patches:
        bars[round(bar.get_y() + bar.get_height() / 2)].append(bar)
    for row, right in enumerate((0.0, 0.25, 1.0)):
        ends = [bar.get_x() + bar.get_width() for bar in bars[row]]
        assert [bar.get_x() for bar in bars[row]] == pytest.approx([0, *ends[:-1]])
        assert ends[-1] == pytest.approx(1)
        green = [b.get_width() for b in bars[row] if to_hex(b.get_facecolor()) == CORRECT_COLOR]
        assert sum(green) == pytest.approx(right)
    assert [text.get_text() for text in axes.texts][:2] == ["cat 50%", "dog 50%"]


def test_words_stay_on_their_part_of_the_bar() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    answers = torch.arange(100) % 40  # forty parts, of which most are too narrow for a name
    names = [f"a class with a long name, number {n}" for n in range(40)]
    figure = draw_confusion(worst_classes(labels, answers, 1), names)
    figure.canvas.draw()
    for bar, text in zip(figure.axes[0].patches, figure.axes[0].texts, strict=True):
        if text.get_text():
            assert text.get_window_extent().width <= bar.get_window_extent().width


def test_without_images_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no images"):
        draw_confusion([], NAMES)
