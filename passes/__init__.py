"""Analyses and rewrites of a graph, one per file. An analysis returns what it learned; a rewrite returns a new graph,
or says that it changes the one it is given."""
