"""Where bytes come from. Nothing in this folder imports the files above it.

corpus.py       a file, a folder or a known name -> training and validation bytes; random windows of them
bpe.py          byte-pair encoding: the words that a subword drafter reads and writes
checkpoints.py  published weights: safetensors and torch files, their names and settings -> ours, and back
noise.py        dropped, repeated, swapped bytes, other cases: what robustness is tested with
files.py        the error that is one line for the user; files that are written whole
synthetic.py    selective copying and induction heads, drawn as they are read
wordpiece.py    the tokens of BERT and of BiGS's released weights
cache/          corpora that were built or downloaded; ignored by git, safe to delete at any time
"""
