"""``/v1/models`` and ``/fabric/v1``: models, pools, dead letters, and the Manager's API passed on to it."""
