"""HTTP of the Router: reading bodies, writing responses, credentials, origins."""
