"""``inferq autoscale``: start workers for one pool and drain them as its queue asks, with drivers of platforms."""
