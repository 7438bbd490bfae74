"""Files become texts, texts become passages, and passages are known again as the documents they were cut from.

Nothing is imported here: who only sends jobs loads no splitter.
"""
