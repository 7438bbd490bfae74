"""The cluster page of Flower: ``celery -A APP flower``, then ``/cluster``."""
