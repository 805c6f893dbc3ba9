"""Where bytes come from, and published weights. Nothing in this folder imports the files above it.

corpus.py       a file, a folder or a known name -> training and validation bytes; windows of them
synthetic.py    selective copying and induction heads, drawn as they are read
vocabulary.py   what a model reads and writes: bytes, ids, WordPiece
bpe.py          byte-pair encoding: the words that a subword drafter reads and writes
wordpiece.py    the tokens of BERT and of BiGS's released weights
ngrams.py       counts of what follows the last bytes in a corpus, without a model
tensors.py      files of weights, safetensors and torch -> {name: tensor}, and back
checkpoints.py  published weights: their names and settings -> ours, and back, by tables
files.py        the error that is one line for the user; files that are written whole
cache/          corpora that were downloaded; ignored by git, safe to delete at any time
"""
