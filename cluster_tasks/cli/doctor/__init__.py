"""``cluster doctor``: what could go wrong with a deployment, and what to do about it. It writes nothing.

``collecting`` looks and tells facts; the checks in ``software``, ``server``, ``nodes`` and ``jobs`` are pure functions
from facts to findings; ``command`` prints them.
"""
