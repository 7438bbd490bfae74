"""The command lines: ``celery -A APP cluster …`` and ``cluster-tasks``."""
