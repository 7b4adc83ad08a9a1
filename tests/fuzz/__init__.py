"""Random and mutated inputs at every edge of the product, counted: ``make fuzz SECONDS=60``."""
