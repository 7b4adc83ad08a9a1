"""The queue over HTTP: a worker that reaches nothing but a Router (:mod:`queue_schemas.worker_protocol`)."""
