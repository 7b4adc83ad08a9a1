"""`inferq jobs`."""
