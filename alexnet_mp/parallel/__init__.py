"""Ranks: the exchange of activations, this rank's place and groups, rendezvous, heartbeat.

Imports config, ops and model. Start with `exchange.py`, the only module that moves activations.
"""
