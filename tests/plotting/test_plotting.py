"""Curves and pictures: what is drawn is what the numbers say, whatever classes are called."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgba
from matplotlib.font_manager import findfont, get_font

from alexnet_mp.plotting import fonts
from alexnet_mp.plotting.curves import compare_curves, draw_curves, epochs_to
from alexnet_mp.plotting.fonts import fit_text
from alexnet_mp.plotting.kernels import (
    EXPLANATION,
    GAP,
    PIXELS_PER_WEIGHT,
    RANDOM_SELECTIVITY,
    color_selectivity,
    draw_kernels,
    kernel_colors,
    kernel_sheet,
)
from alexnet_mp.plotting.predictions import (
    CORRECT_COLOR,
    OTHER_COLOR,
    draw_neighbors,
    draw_predictions,
    draw_samples,
)

ODD_NAMES = [
    "猫",
    "W" * 60,
    "a very long class name that goes on and on",
    "$a^$",
    "_hidden",
    "Ελλάδα",
    "bad\udcff",
    "tab\tnew\nline",
    "",
    "\N{GRINNING FACE}",
]


def history(epochs: int, speed: float = 1.0) -> list[dict]:
    shrink = [1 / (1 + speed * epoch) for epoch in range(epochs)]
    return [
        {
            "epoch": i + 1,
            "step": 10 * (i + 1),
            "lr": 0.1 if i < 5 else 0.01,
            "train_loss": 2 * s,
            "train_top1": 1 - 0.8 * s,
            "val_loss": 2.5 * s,
            "val_top1": 1 - 0.9 * s,
            "val_top5": 1 - 0.5 * s,
        }
        for i, s in enumerate(shrink)
    ]


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(
        256, (*shape, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def line(axes, label: str):
    return next(line for line in axes.get_lines() if line.get_label().strip().startswith(label))


def extents(figure) -> list:
    """Where every visible, non-empty text of `figure` stands, in pixels."""
    figure.canvas.draw()
    texts = [text for axes in figure.axes for text in axes.texts] + figure.texts
    return [(text, text.get_window_extent()) for text in texts if text.get_text()]


# ---- curves ----


def test_curves_are_losses_and_errors_over_epochs(tmp_path) -> None:
    losses, errors = draw_curves(history(8), tmp_path / "curves.png").axes
    assert (tmp_path / "curves.png").stat().st_size > 10000
    assert (losses.get_ylabel(), errors.get_ylabel()) == ("loss", "error")
    assert line(losses, "validation").get_ydata() == pytest.approx(
        [record["val_loss"] for record in history(8)]
    )
    assert line(errors, "training").get_ydata() == pytest.approx(
        [1 - record["train_top1"] for record in history(8)]
    )
    assert line(errors, "validation, top-5").get_ydata() == pytest.approx(
        [1 - record["val_top5"] for record in history(8)]
    )
    assert [text.get_text() for text in losses.texts] == [" lr 0.01"]


@pytest.mark.parametrize("epochs", [1, 2, 8])
def test_axes_begin_at_0_end_above_the_curves_and_count_whole_epochs(epochs: int) -> None:
    small = [record | {"train_loss": 0.02, "val_loss": 0.04} for record in history(epochs)]
    figure = draw_curves(small)
    figure.canvas.draw()
    for axes, highest in zip(figure.axes, (0.04, 0.9), strict=True):
        bottom, top = axes.get_ylim()
        assert bottom == 0 and highest < top < 1.1 * highest
        shown = [tick for tick in axes.get_xticks()]
        assert all(tick == round(tick) for tick in shown)


@pytest.mark.parametrize(("classes", "drawn"), [(2, False), (5, False), (6, True), (None, True)])
def test_top_5_is_drawn_only_where_there_are_more_than_five_classes(classes, drawn: bool) -> None:
    _, errors = draw_curves(history(3), classes=classes).axes
    legend = [text.get_text() for text in errors.get_legend().get_texts()]
    assert ("validation, top-5" in legend) == drawn and len(errors.get_lines()) == 2 + drawn


@pytest.mark.parametrize(("window", "first", "points"), [(3, 3, 6), (8, 8, 1), (100, 8, 1)])
def test_a_window_draws_means_at_their_last_epoch_with_the_epochs_pale_behind(
    window: int, first: int, points: int
) -> None:
    losses, _ = draw_curves(history(8), window=window).axes
    values = [record["val_loss"] for record in history(8)]
    drawn = line(losses, "validation")
    assert drawn.get_xdata()[0] == first and len(drawn.get_ydata()) == points
    assert drawn.get_ydata()[0] == pytest.approx(np.mean(values[:first]))
    assert any(
        len(pale.get_ydata()) == 8 and pale.get_alpha() and list(pale.get_ydata()) == values
        for pale in losses.get_lines()
    )
    assert losses.get_ylabel() == f"loss, mean of {min(window, 8)} epochs"


def test_without_an_epoch_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no epoch has ended"):
        draw_curves([])
    with pytest.raises(ValueError, match="ReLU: no epoch has ended"):
        compare_curves({"ReLU": []}, "train_top1")
    with pytest.raises(ValueError, match="no runs"):
        compare_curves({}, "train_top1")


def test_two_runs_are_compared_with_the_epochs_that_each_needs_to_the_target() -> None:
    figure = compare_curves(
        {"ReLU": history(12, 2), "tanh": history(10, 0.3), "slow": history(2)},
        "train_top1",
        target=0.25,
    )
    axes = figure.axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    # 0.8 / (1 + 2 e) <= 0.25 from e = 2 on, 0.8 / (1 + 0.3 e) from e = 8 on; e counts from 0
    assert legend == [
        "ReLU: 3 epochs to the target",
        "tanh: 9 epochs to the target",
        "slow: target not reached",
        "target: 25%",
    ]
    assert line(axes, "target").get_ydata() == [0.25, 0.25]
    assert line(axes, "ReLU").get_ydata() == pytest.approx(
        [1 - record["train_top1"] for record in history(12, 2)]
    )
    assert len({(drawn.get_color(), drawn.get_linestyle()) for drawn in axes.get_lines()}) == 4
    assert line(compare_curves({"a": history(3)}, "val_loss").axes[0], "a").get_ydata()[0] == 2.5
    with pytest.raises(
        ValueError, match="key nonsense: not a number in every epoch; there are lr, train_loss"
    ):
        compare_curves({"a": history(3)}, "nonsense")


def test_the_epochs_to_a_target_are_those_of_the_curve_that_is_drawn() -> None:
    values = [4.0, 2.0, 3.0, 1.0, 1.0]
    assert [epochs_to(values, 2.0, window) for window in (1, 2, 3, 9)] == [2, 4, 4, None]


# ---- kernels ----


def test_color_selectivity_is_0_for_gray_1_for_opponent_colors_and_two_thirds_for_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(11, 11, generator=generator)
    gray, zeros = pattern.expand(3, 11, 11), torch.zeros(3, 11, 11)
    red_green = torch.stack([pattern, -pattern, torch.zeros_like(pattern)])
    blue_yellow = torch.stack([-pattern, -pattern, 2 * pattern])
    red = torch.stack([pattern, 0 * pattern, 0 * pattern])
    scores = color_selectivity(
        torch.stack([gray, red_green, blue_yellow, red, zeros, 1e-20 * red_green, 5 * gray])
    )
    assert scores.tolist() == pytest.approx([0, 1, 1, 2 / 3, 0, 1, 0], abs=1e-6)
    noise = color_selectivity(torch.randn(500, 3, 11, 11, generator=generator))
    assert (
        noise.mean().item() == pytest.approx(RANDOM_SELECTIVITY, abs=0.01)
        and (noise >= 0).all()
        and (noise <= 1).all()
    )
    mixed = color_selectivity((gray + red_green)[None])  # energies add: 3 parts gray, 2 parts color
    assert mixed.item() == pytest.approx(2 / 5)


def test_each_kernel_is_scaled_by_its_own_largest_weight_around_gray() -> None:
    kernels = torch.zeros(3, 3, 11, 11)
    kernels[0, 0, 2, 3], kernels[0, 1, 0, 0] = 0.001, -0.0005
    kernels[1, 2, 5, 5], kernels[1, 0, 1, 1] = -70.0, 35.0
    colors = kernel_colors(kernels)
    assert colors.shape == (3, 11, 11, 3)
    assert colors[0, 2, 3].tolist() == [1, 0.5, 0.5] and colors[0, 0, 0].tolist() == [
        0.5,
        0.25,
        0.5,
    ]
    assert colors[1, 5, 5].tolist() == [0.5, 0.5, 0] and colors[1, 1, 1].tolist() == [
        0.75,
        0.5,
        0.5,
    ]
    assert (colors[2] == 0.5).all()  # a kernel of zeros is gray, not a division by zero


def test_a_sheet_has_kernel_k_in_row_k_over_16_with_white_between() -> None:
    kernels = torch.randn(48, 3, 11, 11, generator=torch.Generator().manual_seed(0))
    sheet, step = kernel_sheet(kernels), 11 * PIXELS_PER_WEIGHT + GAP
    assert sheet.shape == (3 * step - GAP, 16 * step - GAP, 3)
    for k in (0, 15, 16, 47):
        top, left = k // 16 * step, k % 16 * step
        tile = sheet[
            top : top + 11 * PIXELS_PER_WEIGHT : PIXELS_PER_WEIGHT,
            left : left + 11 * PIXELS_PER_WEIGHT : PIXELS_PER_WEIGHT,
        ]
        assert (tile == kernel_colors(kernels[k : k + 1])[0]).all()
    assert (sheet[step - GAP : step] == 1).all() and (sheet[:, step - GAP : step] == 1).all()
    assert kernel_sheet(kernels[:5]).shape == (step - GAP, 5 * step - GAP, 3)
    assert (
        kernel_sheet(kernels[:17])[step:, step:] == 1
    ).all()  # the rest of a row that is not full


@pytest.mark.parametrize("counts", [(48, 48), (64,), (24, 24, 24, 24), (5, 40)])
def test_columns_stand_above_each_other_with_their_names_and_mean_selectivity(
    tmp_path, counts: tuple[int, ...]
) -> None:
    columns = [torch.randn(count, 3, 11, 11) for count in counts]
    figure = draw_kernels(columns, tmp_path / "kernels.png", note="A note\nof two lines")
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(boxes) == len(counts) and all(
        upper.y0 > lower.y1 for upper, lower in pairwise(boxes)
    )
    texts = [text.get_text() for text in figure.texts]
    for number, kernels in enumerate(columns):
        mean = color_selectivity(kernels).mean()
        assert texts[2 * number] == f"column {number}: {counts[number]} kernels of 11 × 11"
        assert texts[2 * number + 1] == f"color selectivity {mean:.2f} on average"
    assert texts[2 * len(counts) :] == [EXPLANATION, "A note", "of two lines"]
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for _, box in extents(figure))
    bottoms = [box.y0 for _, box in extents(figure)]
    assert bottoms == sorted(bottoms, reverse=True) and bottoms[-1] > 0
    for axes, kernels in zip(figure.axes, columns, strict=True):
        assert axes.images[0].get_array().shape == kernel_sheet(kernels).shape
    with pytest.raises(ValueError, match="no kernels"):
        draw_kernels([])


# ---- images ----


def bars(axes) -> list[tuple[float, str, str]]:
    """(length, color, name) of each bar, from the top."""
    names = [text.get_text() for text in axes.texts[::2]]
    return [
        (patch.get_width(), to_hex(patch.get_facecolor()), name)
        for patch, name in zip(axes.patches, names, strict=True)
    ]


def test_predictions_show_the_five_best_from_the_top_and_the_right_one_in_another_color(
    tmp_path,
) -> None:
    probabilities = torch.tensor(
        [[0.05, 0.4, 0.1, 0.2, 0.15, 0.1], [0.3, 0.25, 0.2, 0.15, 0.1, 0.0]]
    )
    images, classes = random_images(2), list("abcdef")
    figure = draw_predictions(
        images, torch.tensor([3, 5]), probabilities, classes, tmp_path / "predictions.png"
    )
    first, first_bars, second, second_bars = figure.axes
    assert bars(first_bars) == [
        (pytest.approx(p), color, name)
        for p, color, name in [
            (0.4, OTHER_COLOR, "b"),
            (0.2, CORRECT_COLOR, "d"),
            (0.15, OTHER_COLOR, "e"),
            (0.1, OTHER_COLOR, "c"),
            (0.1, OTHER_COLOR, "f"),
        ]
    ]
    assert [color for _, color, _ in bars(second_bars)] == [
        OTHER_COLOR
    ] * 5  # the right one is not among them
    assert first_bars.yaxis_inverted() and first_bars.get_position().y1 < first.get_position().y0
    for axes, image in ((first, images[0]), (second, images[1])):
        assert (axes.images[0].get_array() == image.permute(1, 2, 0).numpy()).all()
    assert [text.get_text() for text in figure.texts[1:]] == ["d", "f"]
    assert (
        len(
            bars(
                draw_predictions(images, torch.tensor([0, 1]), probabilities[:, :2], classes).axes[
                    1
                ]
            )
        )
        == 2
    )


def test_neighbors_stand_in_order_right_of_their_image_and_those_of_its_class_are_framed(
    tmp_path,
) -> None:
    queries, found = random_images(2), random_images(2, 6)
    labels, theirs = torch.tensor([0, 1]), torch.tensor([[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0]])
    distances = torch.arange(12).reshape(2, 6) * 1.5
    figure = draw_neighbors(
        queries,
        found,
        distances,
        tmp_path / "neighbors.png",
        query_labels=labels,
        neighbor_labels=theirs,
        classes=["cat", "dog"],
    )
    assert len(figure.axes) == 2 * 7
    for n in range(2):
        row = figure.axes[7 * n : 7 * n + 7]
        assert (row[0].images[0].get_array() == queries[n].permute(1, 2, 0).numpy()).all()
        for k, axes in enumerate(row[1:]):
            assert (axes.images[0].get_array() == found[n, k].permute(1, 2, 0).numpy()).all()
            spine = axes.spines["left"]
            assert (
                spine.get_visible() and to_rgba(spine.get_edgecolor()) == to_rgba(CORRECT_COLOR)
            ) == bool(theirs[n, k] == labels[n])
        assert all(
            right.get_position().x0 > left.get_position().x1 for left, right in pairwise(row)
        )
    texts = [text.get_text() for text in figure.texts[1:]]
    assert texts[:5] == ["cat", "cat", "0.00", "cat", "1.50"]
    bare = draw_neighbors(queries, found, distances)  # without labels: images and distances only
    assert [text.get_text() for text in bare.texts[1:4]] == ["0.00", "1.50", "3.00"]


def test_samples_are_a_grid_with_the_classes_beneath(tmp_path) -> None:
    figure = draw_samples(
        random_images(11), torch.arange(11) % 3, ["cat", "dog"], tmp_path / "samples.png", per_row=4
    )
    corners = [axes.get_position().p0.round(6) for axes in figure.axes]
    assert (len(corners), len({x for x, _ in corners}), len({y for _, y in corners})) == (11, 4, 3)
    assert [text.get_text() for text in figure.texts[1:4]] == [
        "cat",
        "dog",
        "class 2",
    ]  # a logit that no class of the data has


@pytest.mark.parametrize(
    "make",
    [
        lambda: draw_predictions(random_images(0), torch.empty(0), torch.empty(0, 3), []),
        lambda: draw_samples(random_images(0), torch.empty(0), []),
        lambda: draw_neighbors(random_images(0), random_images(0, 6), torch.empty(0, 6)),
    ],
)
def test_no_images_are_an_error(make) -> None:
    with pytest.raises(ValueError, match="no images"):
        make()


# ---- names ----


@pytest.mark.parametrize("kind", ["predictions", "neighbors", "samples"])
def test_any_class_name_is_drawn_without_a_warning_within_its_place(tmp_path, kind: str) -> None:
    """A warning is an error here, as everywhere in these tests."""
    count, labels, images = (
        len(ODD_NAMES),
        torch.arange(len(ODD_NAMES)),
        random_images(len(ODD_NAMES)),
    )
    if kind == "predictions":
        figure = draw_predictions(
            images,
            labels,
            torch.rand(count, count, generator=torch.Generator().manual_seed(0)).softmax(1),
            ODD_NAMES,
        )
    elif kind == "neighbors":
        figure = draw_neighbors(
            images,
            images.expand(count, *images.shape),
            torch.rand(count, count),
            query_labels=labels,
            neighbor_labels=labels.expand(count, count),
            classes=ODD_NAMES,
        )
    else:
        figure = draw_samples(images, labels, ODD_NAMES)
    boxes, page = extents(figure), figure.bbox
    assert all(
        page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        for _, box in boxes
    )
    for i, (text, box) in enumerate(boxes):
        assert not [other.get_text() for other, theirs in boxes[i + 1 :] if box.overlaps(theirs)], (
            f"{text.get_text()!a} overlaps"
        )
    figure.savefig(tmp_path / "a.png")


def test_any_run_may_be_compared_whatever_its_name(tmp_path) -> None:
    figure = compare_curves(
        {name: history(3) for name in ODD_NAMES}, "train_top1", tmp_path / "a.png", target=0.3
    )
    assert len(figure.axes[0].get_legend().get_texts()) == len(ODD_NAMES) + 1  # none is left out


def test_a_name_fits_is_on_one_line_and_shows_what_no_font_has_as_its_code(monkeypatch) -> None:
    assert fit_text("cat", 2, 8) == "cat" and fit_text(" a\tb\n c ", 2, 8) == "a b c"
    assert fit_text("$x_1$", 2, 8) == r"\$x_1\$"
    assert fit_text("bad\udcff", 2, 8) == r"bad\udcff"
    short = fit_text("W" * 60, 1, 8)
    assert short.endswith("…") and set(short[:-1]) == {"W"} and 5 < len(short) < 12
    assert fit_text("i" * 20, 1, 8) == "i" * 20  # narrow letters take less room
    monkeypatch.setattr(fonts, "FONTS_OF_OTHER_SCRIPTS", ())
    fonts._fonts.cache_clear()
    assert fit_text("猫", 2, 8) == r"\u732b" and fit_text("\U000e0001", 2, 8) == r"\U000e0001"
    ours, theirs = (
        set(get_font(findfont(name)).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral")
    )
    only = next(chr(code) for code in sorted(theirs - ours) if chr(code).isprintable())
    assert fit_text(only, 2, 8) == f"\\u{ord(only):04x}"
    monkeypatch.setattr(
        fonts, "FONTS_OF_OTHER_SCRIPTS", ("STIXGeneral",)
    )  # a font that every machine has, in the role of another script's
    fonts._fonts.cache_clear()
    assert fit_text(only, 2, 8) == only and fonts.font_families() == ["DejaVu Sans", "STIXGeneral"]
    draw_samples(random_images(1), torch.tensor([0]), [only]).canvas.draw()
    monkeypatch.undo()
    fonts._fonts.cache_clear()
