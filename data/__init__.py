"""Where bytes come from. Nothing in this folder imports the files above it.

corpus.py    a file, a folder or a known name -> training and validation bytes; random windows of them
checkpoints.py  published weights: safetensors and torch files, their names and settings -> ours, and back
cache/       corpora that were built or downloaded; ignored by git, safe to delete at any time
"""
