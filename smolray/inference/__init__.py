"""Using a trained model: answers about new images, and image search by text.

In: a run, an export or a hub id. Out: rows of answers, or an index and the images that it finds.
"""
