"""`inferq webhooks`."""
