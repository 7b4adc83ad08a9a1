"""Job queues: jobs put on them and run, beside pipelined XADD; and what a job costs the queue's server."""
