"""The papers' claims measured here: one subpackage a paper."""
