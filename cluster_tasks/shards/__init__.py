"""Collections of documents and the search in them.

Nothing is imported here: LanceDB starts threads, so it is loaded by the process that uses it.
"""
