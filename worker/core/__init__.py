"""The worker's decisions, pure: no await, clock, randomness, environment or I/O."""

__all__: list[str] = []
