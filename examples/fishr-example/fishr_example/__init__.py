"""An algorithm and a dataset for fishr."""
