"""Chaos: a fleet of real processes under load and faults drawn from a seed; a history, and what it proves.

``make chaos SECONDS=60 SEED=7``. ``plan`` draws the faults, ``stage`` has the fleet, ``faults`` does them to it (with
``kills``, ``wires`` and ``junk``). ``clients`` make the load out of ``asks``; ``history`` keeps what was seen, and what
``aftermath`` finds at the end on the queue and in the ``logs``. ``check`` judges it and nothing else: ``judge`` says
what no client may have seen, ``excuses`` what explains that one was not answered. ``report`` shows it, ``run`` is one
run. What it is for: docs/reliability.md.
"""
