"""`inferq queues`, `inferq workers` and `inferq dead`."""
