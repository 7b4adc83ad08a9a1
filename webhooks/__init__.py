"""Webhooks: send an HTTP callback when a batch or background response finishes.

Endpoints, events and deliveries lie in the file store; the notifier (:mod:`.service`) sends them, signed and with
retries.
"""
