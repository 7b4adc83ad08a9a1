"""What starts and ends workers: processes of this machine, an operator's program, Kubernetes; Ray is in ``on_ray``."""
