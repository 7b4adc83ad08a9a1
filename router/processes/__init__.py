"""Several Router processes that serve one port: a parent that supervises them, and each one's link to it."""
