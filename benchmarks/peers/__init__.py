"""The task queues that ``benchmarks.throughput`` compares with, each in an environment of its own.

``app_NAME.py`` is the app of one of them, as its own documentation advises for speed; run as a script it publishes. It
runs in the environment of its queue and imports nothing of this project but ``job``, which lies beside it.
"""
