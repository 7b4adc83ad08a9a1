"""`inferq chat`."""
