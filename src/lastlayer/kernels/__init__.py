"""Arrays in, arrays out: a plain reference beside every fast version."""
