"""Each setting of a run reaches its part, and each part survives a stop and a resume."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from ranks import run as run_ranks
from small_nets import SMALL

from alexnet_mp import AlexNet, Config
from alexnet_mp.parallel.context import init_parallel
from alexnet_mp.training import checkpoint
from alexnet_mp.training.run import Run, run
from alexnet_mp.training.trainer import Trainer

QUICK = SMALL.with_fields(kernels=(2, 2, 2, 2, 2), hidden=(4, 4), limit_val=9)


def prepared(config: Config, **changes) -> Run:
    """A run whose data, network and trainer are ready, and which has not trained yet."""
    config = config.with_fields(**changes)
    return Run(config, init_parallel(config))


def set_validation_losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Replaces the validation loss after epoch N by the Nth of `losses`; the test keeps its own."""
    scores = Trainer.scores

    def replaced(self: Trainer, loader, *name: str):
        found = scores(self, loader, *name)
        if loader.images != QUICK.data.limit_val:
            return found
        return dataclasses.replace(found, loss=losses[self.epoch])

    monkeypatch.setattr(Trainer, "scores", replaced)


def history(out: Path) -> list[dict]:
    """history.jsonl without the times."""
    return [
        {name: value for name, value in json.loads(line).items() if "second" not in name}
        for line in (out / "history.jsonl").read_text().splitlines()
    ]


def test_loss(config: Config, weights: Path) -> float:
    """The loss of the weights in a checkpoint on the test split."""
    one = prepared(config)
    checkpoint.load_model(checkpoint.read(weights), one.model)
    return one.trainer.scores(one.test_loader).loss


test_loss.__test__ = False


def test_the_final_test_takes_the_weights_of_the_best_epoch(tmp_path, monkeypatch) -> None:
    set_validation_losses(monkeypatch, 1.0, 2.0, 3.0)
    result = run(QUICK.with_fields(out=str(tmp_path / "run")))
    monkeypatch.undo()
    best, last = (test_loss(QUICK, tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    assert result["best_epoch"] == 1 and result["test_loss"] == best != last


def test_an_epoch_is_validated_on_the_validation_images(tmp_path) -> None:
    run(QUICK.with_fields(out=str(tmp_path / "run"), epochs=1))
    one = prepared(QUICK)
    checkpoint.load_model(checkpoint.read(tmp_path / "run" / "last.pt"), one.model)
    losses = [one.trainer.scores(loader).loss for loader in (one.val_loader, one.test_loader)]
    assert history(tmp_path / "run")[0]["val_loss"] == losses[0] != losses[1]


def test_the_seed_reaches_weights_dropout_and_order() -> None:
    one, other = prepared(QUICK, seed=5), prepared(QUICK, seed=6)
    expected = AlexNet(one.config.model, seed=5).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in one.model.state_dict().items())
    assert (one.trainer.seed, other.trainer.seed) == (5, 6)
    orders = [list(each.train_loader.order(0)) for each in (one, other)]
    assert orders[0] != orders[1]


def test_patience_and_delta_reach_the_early_stopping() -> None:
    stopping = prepared(QUICK, patience=4, delta=0.25).trainer.early_stopping
    assert (stopping.patience, stopping.delta) == (4, 0.25)
    assert prepared(QUICK, patience=0).trainer.early_stopping is None


def test_the_trainer_gets_its_limits_and_its_precision() -> None:
    trainer = prepared(QUICK, max_steps=7, save_every=3, precision="bf16").trainer
    assert (trainer.max_steps, trainer.save_every, trainer.precision) == (7, 3, "bf16")


def test_the_recipe_reaches_the_optimizer_and_the_plateau() -> None:
    trainer = prepared(
        QUICK,
        lr=0.03,
        bias_lr=0.05,
        momentum=0.7,
        weight_decay=0.002,
        bias_decay=False,
        schedule="plateau",
        lr_factor=0.3,
        lr_patience=5,
        lr_min=1e-4,
    ).trainer
    groups = trainer.optimizer.param_groups
    assert {group["momentum"] for group in groups} == {0.7}
    settings = {(group["kind"], group["lr"], group["weight_decay"]) for group in groups}
    assert settings == {("weight", 0.03, 0.002), ("bias", 0.05, 0.0)}
    plateau = trainer.scheduler
    assert (plateau.factor, plateau.patience) == (0.3, 5)
    floors = {group["kind"]: low for group, low in zip(groups, plateau.min_lrs, strict=True)}
    assert floors == {"weight": 1e-4, "bias": 0.05}


def test_no_epochs_still_save_and_test_the_first_weights(tmp_path) -> None:
    out = tmp_path / "run"
    result = run(QUICK.with_fields(out=str(out), epochs=0))
    assert (result["epochs"], result["steps"], result["best_epoch"]) == (0, 0, None)
    first = AlexNet(Config.from_dict(checkpoint.read(out / "last.pt")["config"]).model, seed=0)
    saved = checkpoint.read(out / "last.pt")["model"]
    assert all(torch.equal(value, saved[name]) for name, value in first.state_dict().items())
    assert result["test_loss"] == test_loss(QUICK, out / "last.pt")


@pytest.mark.parametrize("steps", [5, 6])
def test_a_resume_keeps_a_lowered_rate_and_the_patience(tmp_path, monkeypatch, steps) -> None:
    set_validation_losses(monkeypatch, 1.0, 2.0, 3.0, 4.0, 5.0)
    config = QUICK.with_fields(epochs=5, schedule="plateau", lr_patience=0, patience=3)
    run(config.with_fields(out=str(tmp_path / "whole")))
    out = tmp_path / "run"
    run(config.with_fields(out=str(out), max_steps=steps))  # within the second epoch, at its end
    run(config.with_fields(out=str(out), resume=str(out / "last.pt")))
    assert history(out) == history(tmp_path / "whole")
    rates = [record["lr"] for record in history(out)]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.0002])  # stopped after three worse epochs


def test_a_resume_keeps_the_loss_scale_of_fp16(tmp_path) -> None:
    config = QUICK.with_fields(precision="fp16", max_steps=1, out=str(tmp_path / "run"))
    one = prepared(config)
    one.trainer.loss_scale.scale, one.trainer.loss_scale.good_steps = 8.0, 3
    one.train_and_test()
    one.folder.release()
    other = prepared(config, resume=str(tmp_path / "run" / "last.pt"))
    other.train_and_test()  # its steps have been done
    other.folder.release()
    scale = other.trainer.loss_scale
    assert (scale.scale, scale.good_steps) == (8.0, 4)


def run_on_rank(rank: int, config: Config) -> list[dict]:
    run(config)
    return history(Path(config.run.out))


def on_four_ranks(config: Config, **changes) -> list[dict]:
    """The history of two copies of the network, two ranks each."""
    return run_ranks(run_on_rank, 4, config.with_fields(**changes), timeout=120)[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("four") / "run"
    return on_four_ranks(QUICK, epochs=2, out=str(out))


@pytest.mark.ranks
@pytest.mark.parametrize("save_every", [0, 1])
def test_two_copies_stopped_within_an_epoch_keep_its_sums(
    uninterrupted, tmp_path, save_every: int
) -> None:
    out = tmp_path / "run"
    config = QUICK.with_fields(epochs=2, out=str(out), save_every=save_every)
    on_four_ranks(config, max_steps=5)
    resumed = on_four_ranks(config, resume=str(out / "last.pt"))
    for mine, other in zip(resumed, uninterrupted, strict=True):
        assert mine == pytest.approx(other, rel=1e-12)  # float64 sums in another order
