"""The meter counts by phase, and times waits on the host or on the device."""

import pytest
import torch

from alexnet_mp.parallel.meter import EVALUATION, TRAINING, Meter


def test_values_and_bytes_are_counted_by_phase_layer_and_direction() -> None:
    meter = Meter()
    meter.count("conv3", "forward", torch.zeros(2, 5))
    with meter.counting(EVALUATION):
        meter.count("conv3", "forward", torch.zeros(3, 5, dtype=torch.bfloat16), 2)
        with meter.counting("control"):
            meter.count("control", "forward", torch.zeros(1, dtype=torch.float64))
        assert meter.phase == EVALUATION
    assert meter.phase == TRAINING
    assert meter.total_values("conv3", "forward") == 10
    assert meter.total_values("conv3", "forward", EVALUATION) == 30
    assert meter.total_values("conv3", "backward") == 0
    assert (meter.total_bytes(), meter.total_bytes(EVALUATION), meter.total_bytes("control")) == (
        40,
        60,
        8,
    )


def test_the_phase_comes_back_after_an_error() -> None:
    meter = Meter()
    with pytest.raises(KeyError), meter.counting(EVALUATION):
        raise KeyError
    assert meter.phase == TRAINING


def test_waits_on_the_host_count_at_once_under_the_phase_of_then() -> None:
    meter = Meter()
    meter.add_wait(1.0, 3.0, 3.5)
    with meter.counting(EVALUATION):
        meter.add_wait(1.0, 2.0, 4.0)
    assert dict(meter.exposed_seconds) == {TRAINING: 0.5, EVALUATION: 2.0}
    assert dict(meter.in_flight_seconds) == {TRAINING: 2.5, EVALUATION: 3.0}


class Event:
    """A CUDA event of a device whose clock is `Event.clock`, in milliseconds."""

    clock = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.clock

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_waits_on_the_device_are_events_and_count_when_they_are_resolved(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = Meter()
    assert isinstance(meter.timestamp(device_waits=True), float)  # as long as nobody asks for it
    meter.times_device = True
    assert isinstance(meter.timestamp(device_waits=False), float)  # gloo: the host waits
    stamps = []
    for clock in (1000.0, 1750.0, 2000.0):
        Event.clock = clock
        stamps.append(meter.timestamp(device_waits=True))
    meter.add_wait(*stamps)
    assert not meter.exposed_seconds  # reading an event that has not happened would block
    with meter.counting(EVALUATION):
        meter.resolve_device_times()
        meter.resolve_device_times()
    assert meter.exposed_seconds == {TRAINING: 0.25} and meter.in_flight_seconds == {TRAINING: 1.0}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_devices_own_wait_is_seen_though_the_host_runs_ahead() -> None:
    meter = Meter()
    meter.times_device = True
    sent = meter.timestamp(device_waits=True)
    asked = meter.timestamp(device_waits=True)
    torch.cuda._sleep(100_000_000)  # some 50 ms of a stream that waits
    meter.add_wait(sent, asked, meter.timestamp(device_waits=True))
    torch.cuda.synchronize()
    meter.resolve_device_times()
    assert 0.005 < meter.exposed_seconds[TRAINING] <= meter.in_flight_seconds[TRAINING] < 5
