"""From text to class ids: files, tokens, a vocabulary, batches."""
