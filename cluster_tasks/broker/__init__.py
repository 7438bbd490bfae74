"""The Kombu transport of the cluster and its result backend: where jobs are, and every move of them."""
