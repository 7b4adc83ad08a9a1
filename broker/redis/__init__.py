"""The connection to Redis: multiplexing, scripts, batching, retries, topologies and checks of the server."""
