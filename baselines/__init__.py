"""The other rows of the papers' tables, a file for each method."""
