"""Where bytes come from. Nothing in this folder imports the files above it.

corpus.py    a file, a folder or a known name -> training and validation bytes; random windows of them
cache/       corpora that were built or downloaded; ignored by git, safe to delete at any time
"""
