"""RQ's queues and worker, as batches and webhooks use them."""
