"""The worker at its Manager: it registers, stays registered by heartbeats, and learns its assignment."""
