"""Webhooks: endpoints of tenants, events sent to them, and the notifier that delivers them, signed and with retries."""
