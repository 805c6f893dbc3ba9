"""Where bytes come from, and published weights. Nothing in this folder imports the files above it; cache/ holds corpora
that were downloaded, is ignored by git, and is safe to delete at any time."""
