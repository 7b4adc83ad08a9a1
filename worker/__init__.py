"""The Worker: pulls jobs when it has a free slot, runs them on its engine, publishes the answers."""

__all__: list[str] = []
