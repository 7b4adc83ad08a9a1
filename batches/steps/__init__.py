"""The work of one step of a batch, by phase: validate the input, dispatch its lines, merge the results."""
