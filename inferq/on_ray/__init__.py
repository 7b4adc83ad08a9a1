"""The Ray topology: in a cluster the Manager as an actor, the Router as a Serve application, workers and autoscalers.

Importing this loads no Ray: a process must set Ray's variables before it imports it (:mod:`inferq.ray_cluster`).
"""
