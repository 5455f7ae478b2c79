"""Files on disk: images, headers, lists, caches."""
