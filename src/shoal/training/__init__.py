"""One training, from its lock to its result: what is around it (`execution`), what comes before its first order (`preparing`), and where its roles run (`here`, `processes`).

Nothing here imports torch but `here` and `repeating`, whose roles run in the calling process.
"""
