"""`/v1/webhook_endpoints`."""
