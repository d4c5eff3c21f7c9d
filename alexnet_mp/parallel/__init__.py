"""Ranks: the exchange of activations, each rank's place and groups, and how a lost rank is noticed.

Imports config, ops and model. Start with `exchange.py`, the only module that moves activations;
its bytes and waits are counted in `meter.py`. `context.py` makes a rank's place and groups:
`launcher.py` reads the environment (`schedulers.py` translates srun's and mpirun's),
`rendezvous.py` connects and compares the ranks, `placement.py` keeps a copy of the network on one
host, `devices.py` gives each rank its device and threads. `collectives.py` has the sums and
gathers between steps, `heartbeat.py` and `lifeline.py` notice a lost rank, `failure.py` reads the
errors of backends.
"""
