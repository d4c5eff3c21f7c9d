"""The 2012 optimizer against the paper's two lines, number by number."""

import pytest
import torch
from torch import nn

from alexnet_mp import SGD2012, preset
from alexnet_mp.training import sgd2012
from alexnet_mp.training.sgd2012 import build_optimizer, parameter_groups, set_velocity, velocity_of


def scalar_steps(
    w: float,
    gradients: list[float],
    rates: list[float],
    momentum: float = 0.9,
    decay: float = 0.0005,
) -> list[float]:
    """The paper's update (section 5), in Python floats: the weight after each step."""
    v, weights = 0.0, []
    for gradient, lr in zip(gradients, rates, strict=True):
        v = momentum * v - decay * lr * w - lr * gradient
        w = w + v
        weights.append(w)
    return weights


def steps(
    optimizer: torch.optim.Optimizer,
    weight: nn.Parameter,
    gradients: list[float],
    rates: list[float],
) -> list[float]:
    weights = []
    for gradient, lr in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        weights.append(weight.item())
    return weights


GRADIENTS = [0.5, -1.0, 2.0, 0.25, 0.125, -0.5, 1.0, 1.0]
DROP = [0.1] * 4 + [0.01] * 4


def test_a_step_is_the_papers_update_across_a_drop_of_the_rate() -> None:
    weight = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
    ours = steps(SGD2012([weight]), weight, GRADIENTS, DROP)
    assert ours == pytest.approx(scalar_steps(1.5, GRADIENTS, DROP), rel=1e-13)  # rounding only


def test_a_run_resumed_after_a_drop_keeps_to_the_papers_update() -> None:
    first, second = (nn.Parameter(torch.tensor([1.5], dtype=torch.float64)) for _ in range(2))
    before, after = SGD2012([first]), SGD2012([second])
    ours = steps(before, first, GRADIENTS[:5], DROP[:5])
    second.data.copy_(first.data)
    set_velocity(after, second, velocity_of(before, first))
    ours += steps(after, second, GRADIENTS[5:], DROP[5:])
    assert ours == pytest.approx(scalar_steps(1.5, GRADIENTS, DROP), rel=1e-12)


def test_it_equals_torchs_sgd_at_a_constant_rate_and_not_after_a_drop() -> None:
    ours, theirs = (nn.Parameter(torch.tensor([1.5], dtype=torch.float64)) for _ in range(2))
    a = steps(SGD2012([ours]), ours, GRADIENTS, DROP)
    b = steps(
        torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.0005),
        theirs,
        GRADIENTS,
        DROP,
    )
    assert a[:4] == pytest.approx(b[:4], rel=1e-14)
    # The fifth step still moves by 0.9 of the old velocity, which torch scales down by ten at once.
    velocity = a[3] - a[2]
    assert (a[4] - a[3]) - (b[4] - b[3]) == pytest.approx(0.9 * velocity * (1 - 0.1), rel=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_fused_or_not_a_step_is_the_papers_update(fused: bool, monkeypatch) -> None:
    monkeypatch.setattr(sgd2012, "FUSED", ("cpu",) if fused else ())
    for momentum in (0.9, 0.0):
        weight = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
        ours = steps(SGD2012([weight], momentum=momentum), weight, GRADIENTS, DROP)
        expected = scalar_steps(1.5, GRADIENTS, DROP, momentum=momentum)
        assert ours == pytest.approx(expected, rel=1e-13)


def test_a_rate_of_zero_freezes_weights_and_keeps_the_velocity() -> None:
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = SGD2012([weight])
    steps(optimizer, weight, [1.0], [0.1])
    frozen, velocity = weight.item(), velocity_of(optimizer, weight).item()
    assert steps(optimizer, weight, [5.0, 5.0], [0.0, 0.0]) == [frozen, frozen]
    assert velocity_of(optimizer, weight).item() == velocity != 0


def test_a_parameter_without_a_gradient_stays() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    SGD2012([used, unused]).step()
    assert unused.tolist() == [1, 1] and used[0] < 1


@pytest.mark.parametrize("setting", ["lr", "momentum", "weight_decay"])
def test_a_negative_setting_is_refused_by_name(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} -0.1"):
        SGD2012([nn.Parameter(torch.ones(1))], **{setting: -0.1})


def small(name: str):
    return preset(name).with_fields(kernels=(4, 4, 4, 4, 4), hidden=(4, 4), classes=3)


def test_biases_have_their_own_rate_and_no_decay_in_the_2012_source_only() -> None:
    from alexnet_mp import AlexNet

    rules = {}
    for name in ("paper", "original"):
        config = small(name)
        groups = parameter_groups(AlexNet(config.model), config.recipe)
        rules[name] = {(g["layer"], g["kind"]): (g["lr"], g["weight_decay"]) for g in groups}
    assert set(rules["paper"].values()) == {(0.01, 0.0005)}
    assert {rule for (_, kind), rule in rules["original"].items() if kind == "weight"} == {
        (0.01, 0.0005)
    }
    assert {rule for (_, kind), rule in rules["original"].items() if kind == "bias"} == {
        (0.02, 0.0)
    }


def test_every_parameter_is_in_exactly_one_group() -> None:
    from alexnet_mp import AlexNet

    config = small("original")
    model = AlexNet(config.model)
    grouped = [id(p) for group in parameter_groups(model, config.recipe) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("kind", ["2012", "torch"])
def test_a_velocity_that_is_put_back_continues_as_if_never_taken_out(kind: str) -> None:
    recipe = preset("paper").with_fields(optimizer=kind).recipe
    first, second = nn.Linear(2, 1, dtype=torch.float64), nn.Linear(2, 1, dtype=torch.float64)
    one = build_optimizer(first, recipe)
    for _ in range(3):
        first(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        one.step()
    second.load_state_dict(first.state_dict())
    other = build_optimizer(second, recipe)
    for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
        set_velocity(other, mine, velocity_of(one, theirs))
        mine.grad = theirs.grad.clone()
    one.step()
    other.step()
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
