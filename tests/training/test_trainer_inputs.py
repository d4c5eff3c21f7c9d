"""The Trainer takes other people's modules, loaders and criteria, or refuses them in one line."""

import os
from collections import namedtuple

import pytest
import torch
import torch.utils.checkpoint
from small_nets import TINY
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from alexnet_mp import AlexNet, ModelConfig, Trainer
from alexnet_mp.training.schedule import TorchSchedule


def points(n: int = 12, classes: int = 3, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 2, generator=generator), torch.arange(n) % classes)


def images(n: int = 8, side: int = 67) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 3, side, side, generator=generator), torch.arange(n) % 3)


def trainer(model: nn.Module | None = None, criterion=None, lr: float = 0.1, **options) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(2, 3) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = {"patience": 0, "verbose": False} | options
    return Trainer(model, criterion or nn.CrossEntropyLoss(), optimizer, "cpu", **options)


# --- loaders


class OnlyInWorkers(Dataset):
    """As one that opens its file at the first item: before the fork all workers would share it."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        assert os.getpid() != self.parent, "read in the main process"
        return torch.randn(3, 67, 67), index % 3


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_no_item_of_a_data_set_is_read_outside_the_loaders_workers() -> None:
    loader = DataLoader(OnlyInWorkers(), 4, num_workers=1, multiprocessing_context="fork")
    assert len(trainer(AlexNet(TINY)).train(loader, loader, epochs=1)) == 1


def test_every_item_of_a_training_set_is_read_once_an_epoch() -> None:
    class Counting(TensorDataset):
        read = 0

        def __getitem__(self, index):
            Counting.read += 1
            return super().__getitem__(index)

    data = Counting(*images().tensors)
    trainer(AlexNet(TINY)).train(DataLoader(data, 4), DataLoader(images(), 4), epochs=2)
    assert Counting.read == 16


class Renumbered(Dataset):
    """Labels as a target_transform makes them: `targets` has the numbers of before."""

    def __init__(self) -> None:
        self.targets = [1 + i % 3 for i in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(3, 67, 67), self.targets[index] - 1


def test_labels_are_judged_as_the_loader_gives_them() -> None:
    loader = DataLoader(Renumbered(), 4)
    assert len(trainer(AlexNet(TINY)).train(loader, loader, epochs=1)) == 1


def test_a_sampler_that_takes_some_classes_only_is_taken() -> None:
    x, _ = images(12).tensors
    data = TensorDataset(x, torch.arange(12))  # twelve classes, of which the sampler takes three
    loader = DataLoader(data, 3, sampler=[0, 1, 2])
    assert len(trainer(AlexNet(TINY)).train(loader, loader, epochs=1)) == 1


def test_a_collate_function_may_resize_and_convert() -> None:
    raw = [(torch.zeros(3, 50 + i, 40, dtype=torch.uint8), i % 3) for i in range(8)]

    def collate(items):
        sized = [nn.functional.interpolate(x[None].float(), (67, 67))[0] for x, _ in items]
        return torch.stack(sized), torch.tensor([y for _, y in items])

    loader = DataLoader(raw, 4, collate_fn=collate)
    assert len(trainer(AlexNet(TINY)).train(loader, loader, epochs=1)) == 1


class Stream(IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        yield from zip(*points().tensors, strict=True)


def test_a_loader_without_a_length_trains_epoch_by_epoch() -> None:
    streamed, sized = trainer(), trainer()
    streamed.train(DataLoader(Stream(), 4), DataLoader(Stream(), 4), epochs=2)
    sized.train(DataLoader(points(), 4), DataLoader(points(), 4), epochs=2)
    assert streamed.step == 6 and streamed.train_losses == sized.train_losses
    assert streamed.val_losses == sized.val_losses


def test_a_generator_that_is_used_up_is_named() -> None:
    batches = [points()[:4], points()[4:8]]
    with pytest.raises(ValueError, match="gave no batches with images in epoch 2; a generator"):
        trainer().train((batch for batch in batches), batches, epochs=2)


def test_a_batch_without_images_is_passed_over() -> None:
    empty = (torch.empty(0, 2), torch.empty(0, dtype=torch.long))
    full = [points()[:4], points()[4:8]]
    gaps, whole = trainer(), trainer()
    gaps.train([empty, full[0], empty, full[1], empty], [empty, *full, empty], epochs=2)
    whole.train(full, full, epochs=2)
    assert gaps.step == 4 and gaps.train_losses == whole.train_losses
    assert gaps.val_losses == whole.val_losses
    with pytest.raises(ValueError, match="no batches with images in epoch 1"):
        trainer().train([empty], full, epochs=1)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            {"image": torch.zeros(2, 2), "label": torch.zeros(2)},
            "dict with the keys 'image', 'label'",
        ),
        (torch.zeros(2, 2), "gives a Tensor; \\(images, labels\\) is needed"),
        ([torch.zeros(2, 2)], "gives a list of 1"),
        (None, "gives a NoneType"),
        (([torch.zeros(2)], torch.zeros(1).long()), "images as list; one tensor is needed"),
        ((torch.zeros(2, 2), ["cat", "dog"]), "labels as list; a tensor is needed"),
        ((torch.zeros(2, 2), {"boxes": 1}), "labels as dict"),
        ((torch.zeros(2, 2), torch.zeros(3).long()), "2 images with 3 labels"),
        ((torch.zeros(2, 2), torch.zeros(2)), "labels are torch.float32 of shape \\(2,\\)"),
        ((torch.zeros(2, 2), torch.zeros(2, 1).long()), "shape \\(2, 1\\), but the network has 3"),
        (
            (torch.zeros(2, 2), torch.tensor([0, 5])),
            "labels from 0 to 5, but the network has 3 classes",
        ),
    ],
)
def test_a_batch_that_is_none_is_refused_in_one_line(batch, words: str) -> None:
    one, good = trainer(), [points()[:4]]
    with pytest.raises(ValueError, match=words) as caught:
        one.train([batch], good, epochs=1)
    assert one.step == 0 and "\n" not in str(caught.value)
    assert "the training loader" in str(caught.value)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_whole_type_are_taken(kind: torch.dtype) -> None:
    x, y = points().tensors
    narrow, wide = trainer(), trainer()
    narrow.train(DataLoader(TensorDataset(x, y.to(kind)), 4), [(x, y.to(kind))], epochs=1)
    wide.train(DataLoader(points(), 4), [(x, y)], epochs=1)
    assert narrow.train_losses == wide.train_losses and narrow.val_losses == wide.val_losses


def test_arrays_and_lists_of_labels_are_taken() -> None:
    x, y = points().tensors
    arrays, tensors = trainer(), trainer()
    arrays.train([(x.numpy(), y.numpy())], [(x.numpy(), y.tolist())], epochs=1)
    tensors.train([(x, y)], [(x, y)], epochs=1)
    assert arrays.train_losses == tensors.train_losses
    assert arrays.val_losses == tensors.val_losses


@pytest.mark.parametrize("whole", [True, False])
def test_one_hot_labels_train_as_class_numbers_do(whole: bool) -> None:
    x, y = points().tensors
    hot = nn.functional.one_hot(y, 3)
    hot = hot if whole else hot.float()
    soft, hard = trainer(), trainer()
    soft.train([(x, hot)], [(x, hot)], epochs=2)
    hard.train([(x, y)], [(x, y)], epochs=2)
    assert soft.train_losses == pytest.approx(hard.train_losses)
    for name in ("train_top1", "val_top1", "val_top5"):
        assert soft.history[-1][name] == hard.history[-1][name]


def test_soft_labels_are_refused_where_the_criterion_does_not_take_them() -> None:
    x, y = points().tensors
    one = trainer(criterion=nn.MultiMarginLoss())
    soft = nn.functional.one_hot(y, 3).float()
    with pytest.raises(
        ValueError, match="MultiMarginLoss, does not take the model's output, float32 of"
    ):
        one.train([(x, soft)], [(x, soft)], epochs=1)
    assert one.step == 0


def test_one_logit_alone_is_a_yes_or_a_no() -> None:
    x, _ = points().tensors
    y = (x.sum(1, keepdim=True) > 0).float()
    one = trainer(nn.Linear(2, 1), nn.BCEWithLogitsLoss(), lr=3.0)
    one.train([(x, y)], [(x, y)], epochs=20)
    expected = ((one.model(x) > 0) == (y > 0.5)).float().mean().item()
    assert one.accuracy([(x, y)]) == pytest.approx(expected) and expected > 0.9


def test_the_validation_loader_is_looked_at_before_the_first_step() -> None:
    one, (x, y) = trainer(AlexNet(TINY)), images().tensors
    with pytest.raises(ValueError, match="the validation loader has labels from 6 to 8"):
        one.train([(x, y)], DataLoader(TensorDataset(x, y + 6), 4), epochs=1)
    assert one.step == 0


def test_a_late_label_outside_the_classes_is_named_in_validation_too() -> None:
    x, y = points().tensors
    with pytest.raises(ValueError, match="the evaluation loader has labels from 0 to 7"):
        trainer().evaluate([(x[:2], y[:2]), (x[:2], torch.tensor([0, 7]))])


# --- models


Outputs = namedtuple("Outputs", "logits aux")


class WithAuxiliary(nn.Module):
    """As torchvision's GoogLeNet: two outputs in training, one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.aux = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x):
        return Outputs(self.head(x), self.aux(x)) if self.training else self.head(x)


def test_a_tuple_output_is_refused_by_a_loss_of_torch_in_one_line() -> None:
    one, (x, y) = trainer(WithAuxiliary()), points().tensors
    with pytest.raises(
        ValueError, match=r"CrossEntropyLoss, does not take .*Outputs\(logits, aux\)"
    ):
        one.train([(x, y)], [(x, y)], epochs=1)
    assert one.step == 0


def test_a_tuple_output_is_taken_by_a_criterion_that_takes_it() -> None:
    def criterion(output, labels):
        if isinstance(output, tuple):
            return sum(nn.functional.cross_entropy(part, labels) for part in output)
        return nn.functional.cross_entropy(output, labels)

    one, (x, y) = trainer(WithAuxiliary(), criterion), points().tensors
    one.train([(x, y)], [(x, y)], epochs=1)
    assert one.train_losses[0] > one.val_losses[0]


@pytest.mark.parametrize("shape", [(4, 3, 1), (4,)])
def test_an_output_that_is_no_logits_is_refused(shape: tuple[int, ...]) -> None:
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).reshape(-1)[: torch.Size(shape).numel()].reshape(shape)

    with pytest.raises(ValueError, match="logits of shape \\(images, classes\\) are needed"):
        trainer(Odd(2, 3)).train([points()[:4]], [points()[:4]], epochs=1)


def test_a_head_of_several_layers_trains() -> None:
    model = AlexNet(TINY)
    for i, column in model.columns.items():
        column.fc8 = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4, bias=i == "0"))
    x, y = images(8).tensors
    one = trainer(model)
    assert len(one.train([(x, y + 1)], [(x, y)], epochs=2)) == 2  # four classes now


def test_a_parametrized_layer_trains() -> None:
    model = AlexNet(TINY)
    for column in model.columns.values():
        nn.utils.parametrizations.weight_norm(column.fc8)
    x, y = images().tensors
    assert len(trainer(model).train([(x, y)], [(x, y)], epochs=2)) == 2


class ImagesOnly(AlexNet):
    """A subclass whose forward takes images only, and that has a layer of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gain = nn.Linear(3, 3)

    def forward(self, x):
        return self.gain(super().forward(nn.functional.interpolate(x, (67, 67))))


def test_a_subclass_whose_forward_takes_images_only_trains() -> None:
    x, y = images(8, side=40).tensors
    assert len(trainer(ImagesOnly(TINY)).train([(x, y)], [(x, y)], epochs=2)) == 2


def losses_of(model: nn.Module) -> tuple[list[float], list[float]]:
    x, y = images().tensors
    one = trainer(model, seed=5)
    assert one.network.config is TINY
    one.train([(x, y)], [(x, y)], epochs=2)
    return one.train_losses, one.val_losses


def test_a_network_in_data_parallel_trains_as_the_bare_one() -> None:
    assert losses_of(nn.DataParallel(AlexNet(TINY, seed=3))) == losses_of(AlexNet(TINY, seed=3))


def test_a_compiled_network_trains_as_the_bare_one() -> None:
    with torch.compiler.set_stance("force_eager"):  # compiling takes long, and is torch's
        compiled = losses_of(torch.compile(AlexNet(TINY, seed=3)))
    assert compiled == losses_of(AlexNet(TINY, seed=3))


def test_a_wrapped_network_is_checked_as_the_bare_one() -> None:
    x, y = images(side=64).tensors
    with pytest.raises(ValueError, match=r"this network reads \(N, 3, 67, 67\)"):
        trainer(nn.DataParallel(AlexNet(TINY))).train([(x, y)], [(x, y)], epochs=1)


def test_a_seed_that_changes_nothing_is_said(capsys) -> None:
    trainer(seed=3, verbose=True)
    assert "note: seed 3 changes nothing: Linear" in capsys.readouterr().out
    trainer(AlexNet(TINY), seed=3, verbose=True)
    trainer(verbose=True)
    assert capsys.readouterr().out == ""


def test_without_a_seed_the_masks_are_of_the_networks_own() -> None:
    assert trainer(AlexNet(TINY, seed=7)).seed == 7
    assert trainer(AlexNet(TINY, seed=7), seed=2).seed == 2


class Checkpointed(nn.Module):
    """A network whose forward is run again in backward, as to save memory."""

    def __init__(self, network: AlexNet, reentrant: bool) -> None:
        super().__init__()
        self.network, self.reentrant = network, reentrant

    def forward(self, x):
        x = x.detach().requires_grad_()  # the reentrant kind needs an input with a gradient
        return torch.utils.checkpoint.checkpoint(self.network, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_a_pass_with_its_own_masks(reentrant: bool) -> None:
    x, y = images().tensors
    results = []
    for wrapped in (False, True):
        network = AlexNet(TINY, seed=3)
        model = Checkpointed(network, reentrant) if wrapped else nn.Sequential(network)
        one = trainer(model)
        one.train([(x, y), (x[:4], y[:4])], [(x, y)], epochs=2)
        assert network.training_passes == 4
        results.append([value.tolist() for value in network.state_dict().values()])
    assert results[0] == results[1]


def test_each_pass_before_a_backward_is_repeated_with_its_own_masks() -> None:
    x, _ = images().tensors
    gradients = []
    for wrapped in (False, True):
        network = AlexNet(TINY, seed=3)
        model = Checkpointed(network, False) if wrapped else nn.Sequential(network)
        (model(x[:4]).square().sum() + model(x[4:]).exp().sum()).backward()
        gradients.append([p.grad.tolist() for p in network.parameters()])
    assert gradients[0] == gradients[1]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_hooks_of_the_user_see_each_pass_and_change_nothing() -> None:
    x, y = images().tensors
    bare, hooked, seen = trainer(AlexNet(TINY, seed=3)), trainer(AlexNet(TINY, seed=3)), []
    hooked.model.register_forward_hook(lambda *_: seen.append("forward"))
    hooked.model.register_full_backward_hook(lambda *_: seen.append("backward"))
    for one in (bare, hooked):
        one.train([(x, y)], [(x, y)], epochs=1)
    assert seen == ["forward", "backward", "forward"]
    assert hooked.train_losses == bare.train_losses and hooked.val_losses == bare.val_losses


def test_submodules_in_evaluation_mode_stay_in_it() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3), nn.Dropout(0.5))
    model[0].eval()
    one, seen = trainer(model), []
    one.on_epoch = lambda record, improved: seen.append([m.training for m in model.modules()])
    x, y = points().tensors
    one.train([(x, y)], [(x, y)], epochs=2)
    model.eval()  # to look at some predictions
    one.train([(x, y)], [(x, y)], epochs=1)
    assert seen == [[True, False, True, True]] * 3
    assert model[0].num_batches_tracked == 0 and torch.equal(model[0].running_mean, torch.zeros(2))


def test_an_interrupted_evaluation_leaves_each_mode_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    model[0].eval()

    def broken():
        yield points()[:4]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        trainer(model).evaluate(broken())
    assert [m.training for m in model.modules()] == [True, False, True]


def test_weights_without_an_optimizer_keep_no_gradient_from_step_to_step() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
    x, y = points().tensors
    one = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model[1].parameters(), lr=0.0),
        "cpu",
        0,
        verbose=False,
    )
    one.train([(x, y)] * 5, [(x, y)], epochs=2)
    assert one.gradient_norms[0] == pytest.approx(one.gradient_norms[1])


def test_a_model_that_is_all_frozen_is_refused() -> None:
    model = nn.Linear(2, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        trainer(model).train([points()[:4]], [points()[:4]], epochs=1)


def test_a_conv1_that_the_user_froze_stays_frozen() -> None:
    from alexnet_mp import preset
    from alexnet_mp.training.sgd2012 import build_optimizer

    model = AlexNet(TINY)
    for column in model.columns.values():
        column.conv1.requires_grad_(False)
    before = model.columns["0"].conv1.weight.clone()
    optimizer = build_optimizer(model, preset("demo").recipe)
    one = Trainer(model, nn.CrossEntropyLoss(), optimizer, "cpu", verbose=False)
    x, y = images().tensors
    one.train([(x, y)], [(x, y)], epochs=1)
    assert torch.equal(model.columns["0"].conv1.weight, before)
    assert not model.columns["0"].conv1.weight.requires_grad


# --- criteria


def uneven() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 8 and of 4, whose classes are not the same."""
    x, y = points().tensors
    y = torch.tensor([0, 0, 0, 1, 1, 2, 0, 0, 2, 2, 1, 2])
    return [(x[:8], y[:8]), (x[8:], y[8:])]


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0])),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(
            weight=torch.tensor([0.2, 1.0, 3.0]), ignore_index=1, label_smoothing=0.1
        ),
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
    ],
)
def test_the_mean_loss_is_the_criterions_own_over_all_images(criterion) -> None:
    one, batches = trainer(criterion=criterion, lr=0.0), uneven()
    one.train(batches, batches, epochs=1)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = criterion(one.model(x), y).item()
    expected /= len(x) if criterion.reduction == "sum" else 1
    assert one.train_losses == pytest.approx([expected])
    assert one.val_losses == pytest.approx([expected])


def test_ignored_labels_count_in_no_accuracy_and_are_no_error() -> None:
    x, y = points().tensors
    y = y.clone()
    y[::2] = -100  # torch's own number for "ignore"
    one = trainer(lr=0.0)
    one.train([(x, y)], [(x, y)], epochs=1)
    right = (one.model(x).argmax(1) == y)[1::2].float().mean().item()
    assert one.history[0]["train_top1"] == one.history[0]["val_top1"] == pytest.approx(right)


def test_losses_per_sample_are_averaged() -> None:
    each, mean = trainer(criterion=nn.CrossEntropyLoss(reduction="none")), trainer()
    for one in (each, mean):
        one.train(uneven(), uneven(), epochs=2)
    assert each.train_losses == pytest.approx(mean.train_losses)
    assert torch.allclose(each.model.weight, mean.model.weight)


def test_a_criterion_that_gives_no_tensor_is_refused() -> None:
    one = trainer(criterion=lambda output, labels: {"loss": output.sum()})
    with pytest.raises(ValueError, match="the criterion gives dict"):
        one.train(uneven(), uneven(), epochs=1)


def test_a_mean_is_refused_where_several_ranks_share_a_batch() -> None:
    from alexnet_mp.parallel.context import ParallelContext
    from alexnet_mp.parallel.launcher import Environment

    context = ParallelContext(Environment(world_size=2), torch.device("cpu"), (0, 1))
    with pytest.raises(ValueError, match='2 data ranks need its sum \\(reduction="sum"\\)'):
        trainer(context=context)


# --- schedulers of torch


def rates_of(schedule, epochs: int = 4) -> list[float]:
    """The learning rate of each epoch's last step, of a trainer with one batch an epoch."""
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
    one, rates = None, []

    class Seeing(nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            if logits.requires_grad:
                rates.append(one.lr)
            return super().forward(logits, labels)

    one = Trainer(model, Seeing(), optimizer, "cpu", 0, schedule=schedule(optimizer), verbose=False)
    batches = [points()[:6], points()[6:]]
    one.train(batches, batches, epochs)
    return rates


def test_a_scheduler_of_torch_steps_once_an_epoch() -> None:
    rates = rates_of(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5))
    assert rates == [0.8] * 4 + [0.4] * 4


def test_a_plateau_of_torch_is_given_the_validation_loss() -> None:
    def plateau(optimizer):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        scheduler.best = -1.0  # no loss is better
        return scheduler

    assert rates_of(plateau) == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]


def test_a_cycle_that_counts_steps_steps_after_each() -> None:
    def cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=8)

    alone = torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=0.8)
    scheduler, expected = cycle(alone), []
    for _ in range(8):
        expected.append(alone.param_groups[0]["lr"])
        alone.step()
        scheduler.step()
    assert rates_of(cycle) == expected and len(set(expected)) == 8


def test_any_scheduler_can_be_made_to_count_steps() -> None:
    def halving(optimizer):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return TorchSchedule(scheduler, every_step=True)

    assert rates_of(halving, 2) == [0.8, 0.4, 0.2, 0.1]


def test_a_scheduler_of_torch_continues_from_its_saved_state() -> None:
    def made():
        one = trainer(lr=0.8)
        one.schedule = TorchSchedule(torch.optim.lr_scheduler.StepLR(one.optimizer, 2, 0.5))
        return one

    whole, first, second = made(), made(), made()
    whole.train(uneven(), uneven(), epochs=5)
    first.train(uneven(), uneven(), epochs=3)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    second.train(uneven(), uneven(), epochs=2)
    assert second.lr == whole.lr == 0.2 and second.train_losses == whole.train_losses


def test_what_is_no_schedule_of_this_optimizer_is_refused() -> None:
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 1)
    with pytest.raises(ValueError, match="made for another optimizer"):
        trainer(schedule=other)
    with pytest.raises(ValueError, match="schedule float: a scheduler of torch"):
        trainer(schedule=0.1)
