"""Ranks: the exchange of activations, each rank's place and groups, and how a lost rank is noticed.

Imports config, ops and model. Start with `exchange.py`, the only module that moves activations; its
bytes and waits are counted in `meter.py`. `context.py` makes a rank's place and groups:
`launcher.py` reads the environment, `rendezvous.py` connects and compares the ranks, `devices.py`
gives each its device and threads. `collectives.py` has the sums and gathers between steps,
`heartbeat.py` notices a lost rank, `failure.py` reads the errors of backends.
"""
