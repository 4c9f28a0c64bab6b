"""The other rows of the papers' tables, a file for each method, as short as the methods in front."""
