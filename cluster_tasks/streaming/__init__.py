"""The text of running jobs, on its way from the node to whoever reads it.

It goes over one Redis stream a job. Every entry says how long the text is with it, and its checksum: a reader takes it
only if it continues what he has, or begins anew. So text of two attempts at a job is never joined, whatever is lost,
late or repeated. The stream is a preview: the result that the job commits is what counts, and the reader brings the
text in line with it at the end.
"""
