"""What runs on a node: the worker's steps, its agent, and the processes of one machine."""
