"""``/worker/v1``: the queue for workers that have it over HTTP (:mod:`queue_schemas.worker_protocol`)."""
