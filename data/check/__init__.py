"""What is wrong with a data set, found before an hour is spent on it.

`inspection` looks at every row as it is tokenised; `texts` and `secrets` look into its text; `duplicates` compares
rows; `report` says what they found; `pieces` and `page` show rows token by token.
"""
