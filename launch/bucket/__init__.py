"""A run whose folder is in a bucket: copied there and back, with one owner at a time."""
