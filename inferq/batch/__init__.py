"""`inferq batch`."""
