"""The parts of ``Broker``: each module holds the queue operations of one kind of caller, one method per operation."""
