"""What every HTTP service shares: app set-up, access rules, connections, the server, and clients within the fleet."""
