"""An app that joins a cluster by one line, and leaves it by the same."""
