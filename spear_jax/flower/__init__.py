"""Clients and server as Flower apps: a real device trains the round that simulation trains.

`messages` says what travels, `node` is a client on its own device, `server` is the run that asks
them. `masks` and `secure` add clients' numbers up so that the server sees sums alone. `client_app` and
`server_app` are what Flower starts. `python -m spear_jax.flower` writes the app of an experiment.
"""

STAGES = ("share", "mask", "reveal")  # of a secure sum, behind training
PROTOCOL = 1  # of the messages; a node and a server of different ones refuse each other
