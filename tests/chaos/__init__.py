"""Chaos: a fleet of real processes under load and faults drawn from a seed, and a check of what clients saw.

``make chaos SECONDS=60 SEED=7``. ``plan`` draws the faults; ``fleet`` starts the processes; ``faults`` injects the
faults with ``processes``, ``network`` and ``stream_garbage``. ``clients`` send the requests of ``workload``;
``history`` records what they see, and ``final_state`` adds what is left on the queue and in the ``logs``. ``check``
then reads the history alone: ``answers`` finds what no client may see, ``explanations`` which fault explains a missing
answer. ``report`` prints the result; ``run`` ties one run together. See docs/reliability.md.
"""
