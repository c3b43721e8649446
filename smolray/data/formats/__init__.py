"""The data formats: which files a source has, and how each format is cut into read tasks and read as raw rows."""
