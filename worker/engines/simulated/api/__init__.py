"""The simulated engine's HTTP API: requests as vLLM reads them, answers as vLLM writes them."""
