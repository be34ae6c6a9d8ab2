"""Algorithms on numbers. Nothing here imports torch; each is tested against brute force on made-up programs."""
