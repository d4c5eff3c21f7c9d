"""The loop, with the tutorial's names, on modules and loaders of any kind."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from alexnet_mp import AlexNet, ModelConfig, Trainer, preset
from alexnet_mp.training.metrics import evaluate, topk_correct
from alexnet_mp.training.schedule import build_schedule
from alexnet_mp.training.sgd2012 import build_optimizer
from alexnet_mp.training.trainer import NonFiniteError


def images(n: int, seed: int = 0, classes: int = 3) -> TensorDataset:
    """Points on a plane whose class a linear layer can learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    return TensorDataset(x, (x.sum(1) * 2).floor().clamp(0, classes - 1).long())


def trainer(patience: int = 7, lr: float = 0.1, **options) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=lr),
        "cpu",
        patience,
        verbose=False,
        **options,
    )


def test_the_losses_are_means_over_images_not_over_batches() -> None:
    data = images(10)  # batches of 4, 4 and 2
    one = trainer(lr=0.0)
    one.train(DataLoader(data, 4), DataLoader(data, 3), epochs=1)
    x, y = data.tensors
    expected = nn.functional.cross_entropy(one.model(x), y).item()
    assert one.train_losses == pytest.approx([expected]) and one.val_losses == pytest.approx(
        [expected]
    )
    assert one.evaluate(DataLoader(data, 7)) == pytest.approx(expected)


def test_a_summed_loss_divided_by_the_batch_trains_as_the_mean_does() -> None:
    data = images(10)
    weights = []
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        one = trainer()
        one.criterion = criterion
        one.train(DataLoader(data, 4), DataLoader(data, 4), epochs=3)
        weights.append(one.model.weight.detach().clone())
    assert torch.allclose(*weights, rtol=1e-6)


def test_accuracy_is_a_fraction_of_one() -> None:
    one = trainer()
    one.train(DataLoader(images(200), 20), DataLoader(images(50, 1), 20), epochs=10)
    x, y = images(50, 2).tensors
    expected = (one.model(x).argmax(1) == y).float().mean().item()
    assert one.accuracy(DataLoader(images(50, 2), 8)) == pytest.approx(expected)
    assert 0.5 < expected <= 1


def test_gradient_norms_are_the_mean_over_the_steps_of_an_epoch() -> None:
    one, data = trainer(lr=0.0), images(10)
    one.train(DataLoader(data, 5), DataLoader(data, 5), epochs=2)
    norms = []
    for x, y in DataLoader(data, 5):
        one.model.zero_grad()
        nn.functional.cross_entropy(one.model(x), y).backward()
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in one.model.parameters())))
    assert one.gradient_norms == pytest.approx([sum(norms) / 2] * 2)


def test_training_stops_early_and_the_model_has_the_best_epochs_weights() -> None:
    one = trainer(patience=2, lr=0.5)
    train, val = DataLoader(images(30), 30), DataLoader(images(30, 1), 30)
    one.train(train, val, epochs=3)
    for group in one.optimizer.param_groups:
        group["lr"] = 50.0  # from here on it gets worse
    one.train(train, val, epochs=50)
    assert one.stopped_early and len(one.val_losses) < 50
    assert one.evaluate(val) == pytest.approx(min(one.val_losses))


def test_the_rate_halves_after_three_epochs_without_improvement_by_default() -> None:
    one = trainer(patience=0, lr=1.0)
    for group in one.optimizer.param_groups:
        group["lr"] = 0.0  # no step: the validation loss never improves after the first epoch
    one.scheduler.best = -1.0
    one.optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(4):
        one.schedule.end_epoch(1.0)
    assert one.scheduler.factor == 0.5 and one.lr == pytest.approx(5e-4)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_says_where() -> None:
    data, model, before = images(8), nn.Linear(2, 3), None
    data.tensors[0][5] = float("inf")  # in the second batch

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            nonlocal before
            super().step(closure)
            before = model.weight.detach().clone()

    optimizer = Recording(model.parameters(), lr=0.1)
    one = Trainer(model, nn.CrossEntropyLoss(), optimizer, "cpu", verbose=False)
    with pytest.raises(NonFiniteError, match=r"step 2 \(epoch 1\).*lr 0.1"):
        one.train(DataLoader(data, 4), DataLoader(images(4), 4), epochs=1)
    assert torch.equal(one.model.weight, before)


def test_max_steps_leaves_an_epoch_unfinished_and_unrecorded() -> None:
    one = trainer(max_steps=4)
    one.train(DataLoader(images(9), 3), DataLoader(images(3), 3), epochs=5)
    assert (one.step, one.epoch, one.batch, len(one.history)) == (4, 1, 1, 1)


def test_a_request_to_stop_is_obeyed_after_the_step() -> None:
    one = trainer()

    class Stopping(nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            one.stop_requested = one.step == 1
            return super().forward(logits, labels)

    one.criterion = Stopping()
    one.train(DataLoader(images(9), 3), DataLoader(images(3), 3), epochs=5)
    assert (one.step, one.epoch, one.history) == (2, 0, [])


def test_a_loader_without_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="training loader has no batches"):
        trainer().train(
            DataLoader(images(2), 4, drop_last=True), DataLoader(images(2), 2), epochs=1
        )
    with pytest.raises(ValueError, match="validation loader has no batches"):
        trainer().train(DataLoader(images(2), 2), [], epochs=1)


def test_a_moving_average_wider_than_the_curve_takes_what_there_is() -> None:
    assert Trainer.moving_average([1.0, 2.0, 3.0, 4.0], 2).tolist() == [1.5, 2.5, 3.5]
    assert Trainer.moving_average([1.0, 3.0], 10).tolist() == [2.0]
    assert Trainer.moving_average([], 3).tolist() == []
    with pytest.raises(ValueError, match="window_size 0"):
        Trainer.moving_average([1.0], 0)


def test_plot_losses_draws_both_curves(tmp_path) -> None:
    one = trainer()
    one.train(DataLoader(images(9), 3), DataLoader(images(3), 3), epochs=4)
    figure = one.plot_losses(window_size=2, path=tmp_path / "losses.png")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["training"].get_ydata() == pytest.approx(
        Trainer.moving_average(one.train_losses, 2)
    )
    assert list(lines["validation"].get_xdata()) == [2, 3, 4]
    assert (tmp_path / "losses.png").stat().st_size > 5000


def test_a_trainer_continues_from_its_state_as_if_never_interrupted() -> None:
    def data():
        return DataLoader(images(9), 3), DataLoader(images(5, 1), 3)

    whole = trainer()
    whole.train(*data(), epochs=4)
    first = trainer()
    first.train(*data(), epochs=2)
    second = trainer()
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    second.train(*data(), epochs=2)
    timeless = [{k: v for k, v in record.items() if "second" not in k} for record in second.history]
    assert timeless == [
        {k: v for k, v in record.items() if "second" not in k} for record in whole.history
    ]


def test_top_k_counts_the_label_among_the_k_largest_logits() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 2, 0]])
    labels = torch.tensor([0, 2, 3])
    assert [topk_correct(logits, labels, k).item() for k in (1, 2, 3, 4, 5)] == [1, 2, 2, 3, 3]


def test_evaluation_has_no_dropout_and_leaves_the_model_training() -> None:
    model = AlexNet(
        ModelConfig(kernels=(4, 4, 4, 4, 4), hidden=(8, 8), classes=3, image_size=67)
    ).train()
    batches = [(torch.randn(4, 3, 67, 67), torch.tensor([0, 1, 2, 0]))]
    assert evaluate(model, batches, device=torch.device("cpu")) == evaluate(
        model, batches, device=torch.device("cpu")
    )
    assert model.training


def test_evaluating_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        evaluate(nn.Linear(2, 2), [], device=torch.device("cpu"))


def test_conv1_leaves_autograd_when_the_schedule_freezes_it() -> None:
    config = preset("original").with_fields(
        image_size=64, kernels=(4, 4, 4, 4, 4), hidden=(6, 6), classes=3, epochs=5, lr=0.001
    )
    model = AlexNet(config.model, seed=0)
    optimizer = build_optimizer(model, config.recipe)
    one = Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        "cpu",
        0,
        schedule=build_schedule(optimizer, config.recipe),
        verbose=False,
    )
    batches = [
        (
            torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
            torch.tensor([0, 1, 2, 0]),
        )
    ]
    seen = []
    one.on_epoch = lambda record, improved: seen.append(
        [
            {name: p.detach().clone() for name, p in model.named_parameters()},
            {name for name, p in model.named_parameters() if p.grad is None},
        ]
    )
    one.train(batches, batches, epochs=5)
    # Epoch 72 of 90 is 4 of 5: the fifth epoch leaves conv1 as it was, computes nothing for it, and
    # goes on with the others.
    (before, _), (after, without_gradient) = seen[3:]
    conv1 = {name for name in before if ".conv1." in name}
    assert len(conv1) == 4 and without_gradient == conv1
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert conv1 <= unchanged and "columns.0.fc8.weight" not in unchanged
    assert seen[0][1] == set()


def test_the_color_noise_ends_when_the_schedule_says_so() -> None:
    class Augment:
        noise_off = False

    class Loader(list):
        augment = Augment()

    one, states = trainer(patience=0), []
    one.schedule = build_schedule(one.optimizer, preset("original").with_fields(epochs=4).recipe)
    one.on_epoch = lambda record, improved: states.append(Loader.augment.noise_off)
    one.train(Loader(DataLoader(images(8), 4)), DataLoader(images(4), 4), epochs=4)
    assert states == [False, False, False, True]  # epoch 67 of 90 is 2.98 of 4
