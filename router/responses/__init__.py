"""`/v1/responses`, built from chat completions."""
