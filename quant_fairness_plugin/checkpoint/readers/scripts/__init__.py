"""Scripts that run in the Python of a reader. They import nothing of this package."""
