"""Persisted jobs: idempotent, resumable and background requests, and `/v1/jobs`."""
