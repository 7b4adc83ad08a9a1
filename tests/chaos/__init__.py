"""Chaos: a fleet of real processes under load and faults drawn from a seed; a history, and what it proves.

``make chaos SECONDS=60 SEED=7``. ``plan`` draws the faults, ``stage`` has the fleet and executes them, ``clients`` make
the load, ``history`` keeps what was seen, ``check`` judges it and nothing else, ``report`` shows it.
"""
