"""Messages of the control plane: registration, heartbeats, assignments, pools, the acting Manager's address."""
