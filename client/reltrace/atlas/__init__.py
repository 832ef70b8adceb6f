"""The strongest places of neurons and heads in a corpus: made by workers, merged and read here."""
