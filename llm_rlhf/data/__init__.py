"""Users' data of every column type, read, checked and tokenized."""
