"""``inferq conformance``: checks a worker against a scripted Router, and a Router with a scripted worker."""
