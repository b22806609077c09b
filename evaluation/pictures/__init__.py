"""Pictures of what a backbone learned; `python -m evaluation.show` draws them."""
