"""Half precision over ranks: one loss scale for all of them, whoever's gradient overflowed."""

import torch
from ranks import run as run_ranks
from small_nets import TINY_RUN

from alexnet_mp import Config
from alexnet_mp.ops.precision import LossScale
from alexnet_mp.parallel.context import init_parallel
from alexnet_mp.training import checkpoint
from alexnet_mp.training.run import Run

CONFIG = TINY_RUN.with_fields(precision="fp16")


def overflowing(rank: int, config: Config) -> tuple[float, int, int]:
    """A run with an overflow in step 4, in column 1: (loss scale, steps, steps since) here."""
    one = Run(config, init_parallel(config))
    trainer = one.trainer
    if "1" in trainer.model.columns:
        trainer.model.columns["1"].conv4.bias.register_hook(
            lambda g: g * float("inf") if trainer.step + 1 == 4 else g
        )
    one.train_and_test()
    return trainer.loss_scale.scale, trainer.step, trainer.loss_scale.good_steps


def test_an_overflow_on_one_rank_skips_the_step_and_halves_the_scale_on_all(tmp_path) -> None:
    assert (
        run_ranks(overflowing, 2, CONFIG.with_fields(out=str(tmp_path / "two")))
        == [(2.0**15, 6, 2)] * 2
    )
    assert overflowing(0, CONFIG.with_fields(out=str(tmp_path / "one"))) == (2.0**15, 6, 2)
    two, one = (checkpoint.read(tmp_path / name / "last.pt")["model"] for name in ("two", "one"))
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=2e-2, atol=1e-5
        )  # DESIGN.md: reduced precision


def test_the_scale_halves_at_an_overflow_and_doubles_after_2000_good_steps() -> None:
    scale = LossScale("fp16")
    assert not scale.update(float("inf")) and scale.scale == 2.0**15
    assert all(scale.update(1.0) for _ in range(1999)) and scale.scale == 2.0**15
    assert scale.update(1.0) and scale.scale == 2.0**16
    for _ in range(17):
        scale.update(float("nan"))
    assert scale.exhausted
