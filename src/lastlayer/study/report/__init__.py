"""How results reach a reader: figures, tables, charts, a page."""
