"""What starts and ends workers: processes of this machine, an operator's program, Ray, Kubernetes."""
