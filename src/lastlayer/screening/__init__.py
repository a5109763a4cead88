"""Fast queries of a weight that is already trained."""
