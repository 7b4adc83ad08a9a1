"""The worker protocol: how a worker takes jobs and answers them over HTTP, under ``/worker/v1`` of a Router.

:mod:`.messages` are the calls about sessions and claims, :mod:`.jobs` what a worker is given, :mod:`.output` what it
sends back, :mod:`.encoding` how all of them look in JSON and msgpack. The page for authors of workers is
``docs/worker-protocol.md``.
"""
