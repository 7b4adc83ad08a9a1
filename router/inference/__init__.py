"""Inference requests: from HTTP to a job, and from frames to the answer."""
