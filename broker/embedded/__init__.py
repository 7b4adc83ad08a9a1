"""The Valkey server that `inferq up` runs: its process, data folder, log repair and local password."""
