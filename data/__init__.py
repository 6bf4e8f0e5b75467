"""Rows -> messages -> tokens and targets -> batches.

`sources` (`hub`) reads files, folders and hub data sets row by row; `formats` makes conversations of their rows;
`tokenize` makes tokens and marks the targets; `pipeline` does all of that in chunks, with `workers` where there are
many, and keeps what `keys` says of each row; `near` and `split` hold rows out; `shapes` and `batches` group and pad
them.
`dataset` ties these together, over `array_store` and `token_rows`; `token_cache` keeps what was tokenised; `check` says
what is wrong with it, `prepare` makes rows. NumPy only: nothing here imports a backend, and transformers, pandas and
datasets are imported where they are used.
"""
