"""A cluster driven through pytest-celery."""
