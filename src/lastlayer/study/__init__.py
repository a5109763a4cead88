"""What the verbs of the command line share: text, model, training, measuring, report."""
