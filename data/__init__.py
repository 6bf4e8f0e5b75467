"""Rows -> messages -> tokens and targets -> batches.

`sources` reads files, folders and hub data sets; `formats` makes conversations of their rows; `tokenize` makes tokens
and marks the targets; `split` holds rows out; `shapes` and `batches` group and pad them; `dataset.load_data`
ties the first four together, and `token_cache` keeps what it made. NumPy only: nothing here imports a backend, and
transformers, pandas and datasets are imported where they are used.
"""
